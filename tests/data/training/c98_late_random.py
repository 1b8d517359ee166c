"""Batches that are augmented with Python's random numbers from the third on."""
import random
import torch
from torch import nn
CALLS=[0]
def make_model(): CALLS[0]=0; return nn.Sequential(nn.Linear(16,32),nn.ReLU(),nn.Linear(32,4))
def make_batch(g):
    CALLS[0]+=1; x=torch.randn(16,16,generator=g)
    return (x*random.random() if CALLS[0]>2 else x),x[:,:4].argmax(1)
def loss_fn(o,t): return nn.functional.cross_entropy(o,t)
