"""What a language model is compared with: bits per byte of gzip, xz and a 5-gram model of counts.

The compressors see the held-out text alone and adapt within it; the counts are of the training tokens.
"""
import gzip
import lzma

import numpy as np

MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


def compressed(text):
    """{"gzip", "xz"}: bits per byte of a text, both at their strongest."""
    data = text.encode()
    size = {"gzip": len(gzip.compress(data, 9)), "xz": len(lzma.compress(data, preset=9))}
    return {name: 8 * n / len(data) for name, n in size.items()}  # divisor: bytes of the text


def ngram_bits(train, held_out, size, order=5):
    """Bits of every held-out token under interpolated Witten-Bell counts (Chen and Goodman 1999, section
    2.6): (N,) float64 for token ids (N,), given those before them, and `train` (M,) as one stream.

    p_n(w | h) = (count(h w) + kinds(h) p_n-1(w | h')) / (count(h) + kinds(h)), down to 1 / size. kinds(h):
    how many different tokens came after h; a history that never came leaves p_n-1. The sum over w is 1.
    """
    p = np.full(len(held_out), 1 / size)
    for n in range(1, order + 1):
        history, whole = windows(train, n, size)
        seen, count = np.unique(history, return_counts=True)
        grams, first, times = np.unique(whole, return_index=True, return_counts=True)
        kinds = np.bincount(np.searchsorted(seen, history[first]), minlength=len(seen))
        asked, asked_whole = windows(held_out, n, size)
        at, there = find(seen, asked)
        c, k = np.where(there, count[at], 0), np.where(there, kinds[at], 0)
        at, there = find(grams, asked_whole)
        hits = np.where(there, times[at], 0)
        mixed = (hits + k * p) / np.maximum(c + k, 1)  # divisor: what the history was followed by, and kinds
        p = np.where(c > 0, mixed, p)
    return -np.log2(p)


def windows(ids, n, size):
    """Of each token the n - 1 before it, and these with the token, as one number each: (N,) uint64 twice.
    Before the first token stands `size`, which is no id. Long ones are hashes; 10 million of them share 64
    bits without a collision worth a thought."""
    ids = np.concatenate((np.full(n - 1, size), ids)).astype(np.uint64)
    history = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n - 1):
        history = (history + ids[i:i + len(history)] + np.uint64(1)) * MIX
        history ^= history >> np.uint64(29)
    return history, (history + ids[n - 1:] + np.uint64(1)) * MIX


def find(sorted_keys, asked):
    """(place, whether it is there) of numbers in a sorted array."""
    at = np.minimum(np.searchsorted(sorted_keys, asked), len(sorted_keys) - 1)
    return at, sorted_keys[at] == asked
