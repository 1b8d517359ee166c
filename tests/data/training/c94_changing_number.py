"""A number beside the tensors of a batch (a temperature) that changes with each."""
import torch
from torch import nn
class M(nn.Module):
    def __init__(s): super().__init__(); s.a=nn.Linear(16,32); s.o=nn.Linear(32,4)
    def forward(s,x,temperature): return s.o(torch.relu(s.a(x)))/temperature
CALLS=[0]
def make_model(): return M()
def make_batch(g): CALLS[0]+=1; x=torch.randn(16,16,generator=g); return {"x":x,"temperature":1.0+CALLS[0]},x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)
