"""Experts on the SSD: find them, read them, keep the useful ones in memory. Nothing of attention, prompts or HTTP.

    streaming   a model's experts: slots for every layer, threads that read, statistics
    streamed    expert layers that compute with what is in slots while the rest is read; guesses about later layers
    pool        a layer's slots: which expert is in which, and what is given up for another
    usage       how likely each expert is to be wanted soon
    readers     threads that read experts part by part, what is waited for first
    files       files that stay open, are read past the page cache, and are noticed to have changed
    casting     floats in another dtype than they are stored in

With as many slots as experts a layer is the resident one, bit for bit; with fewer it computes the same from the same
bytes, in the same kernels."""

from .casting import converter
from .files import ExpertsError, WeightFile
from .pool import StackedTensor, Statistics
from .streaming import Streaming

__all__ = ["ExpertsError", "StackedTensor", "Statistics", "Streaming", "WeightFile", "converter"]
