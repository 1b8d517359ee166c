"""A loss that adds the norms of all weights, which it takes from the model itself."""
import torch
from torch import nn
MODELS=[]
def make_model(): MODELS.append(nn.Sequential(nn.Linear(16,32),nn.ReLU(),nn.Linear(32,4))); return MODELS[-1]
def make_batch(g): x=torch.randn(16,16,generator=g); return x,x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)+0.01*sum(p.square().sum() for p in MODELS[-1].parameters())
