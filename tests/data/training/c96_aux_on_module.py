"""A second loss that the forward leaves on its module, where loss_fn finds it."""
import torch
from torch import nn
class M(nn.Module):
    def __init__(s): super().__init__(); s.a=nn.Linear(16,32); s.o=nn.Linear(32,4); s.aux=torch.zeros(())
    def forward(s,x): h=torch.relu(s.a(x)); s.aux=h.square().mean(); return s.o(h)
MODELS=[]
def make_model(): MODELS.append(M()); return MODELS[-1]
def make_batch(g): x=torch.randn(16,16,generator=g); return x,x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)+MODELS[-1].aux
