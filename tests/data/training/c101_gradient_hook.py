"""A hook that masks the gradient of some weights."""
import torch
from torch import nn
def make_model():
    m=nn.Sequential(nn.Linear(16,32),nn.ReLU(),nn.Linear(32,4)); mask=torch.ones(32,16); mask[:16]=0
    m[0].weight.register_hook(lambda g: g*mask); return m
def make_batch(g): x=torch.randn(16,16,generator=g); return x,x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)
