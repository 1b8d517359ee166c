"""A loss that grows with the number of its calls (annealing)."""
import torch
from torch import nn
class Loss:
    def __init__(s): s.calls=0
    def __call__(s,o,t): s.calls+=1; return nn.functional.cross_entropy(o,t)*s.calls
LOSS=Loss()
def make_model(): LOSS.calls=0; return nn.Sequential(nn.Linear(16,32),nn.Tanh(),nn.Linear(32,4))
def make_batch(g): x=torch.randn(16,16,generator=g); return x,x[:,:4].argmax(1)
def loss_fn(o,t): return LOSS(o,t)
def make_optimizer(ps): return torch.optim.SGD(ps,lr=0.01)
