"""Preferences as people give them: the better answer wins more often, not always.

Plackett-Luce says how often (plackett_luce.py fits it): of K answers with utilities u_i the best one is i
with probability softmax(u / T)_i, then the best of the rest, and so on. Its rankings are drawn without a
table of K! probabilities: add Gumbel noise to every utility and sort (Yellott, 1977). For two answers that is
Bradley-Terry, sigmoid((u_1 - u_2) / T).
"""
import torch


def noisy(preference, temperature, generator):
    """preference + temperature x Gumbel noise, one draw an entry: a ranking by Plackett-Luce.

    preference   any shape, float; temperature >= 0 in its units, 0: as it is, and nothing is drawn
    generator    on the host, so that a run on another device is told the same
    returns      the same shape. The order of any K entries is an exact draw of Plackett-Luce with utilities
                 preference / temperature. Not centred: the noise has mean 0.58 and deviation 1.28
                 temperatures, and orders do not hang on what is added to all
    """
    if not temperature:
        return preference
    uniform = torch.rand(preference.shape, generator=generator)
    gumbel = -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()
    return preference + temperature * gumbel.to(preference)
