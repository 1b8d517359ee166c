"""Blocks in a Sequential that compute their activations again."""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
class Block(nn.Module):
    def __init__(s): super().__init__(); s.f=nn.Sequential(nn.Linear(16,64),nn.GELU(),nn.Linear(64,16))
    def forward(s,x): return x+checkpoint(s.f,x,use_reentrant=False)
def make_model(): return nn.Sequential(Block(),Block(),Block(),nn.Linear(16,4))
def make_batch(g): x=torch.randn(16,16,generator=g); return x,x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)
