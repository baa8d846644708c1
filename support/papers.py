"""What the papers printed, for `eval.py --papers`: none of these numbers was measured here, and none of ours
belongs in their columns. Per cent of the papers are fractions where our own files have fractions.
"""
# Yang et al. 2023, test accuracy (std).
PROMPT = """few-shot finetuning | 0.806 (0.039) | 0.849 (0.036)
soft prompt tuning  | 0.738 (0.109) | 0.826 (0.009)
BB Tuning-50        | 0.891 (0.009) | 0.835 (0.009)
AutoPrompt          | 0.750 (0.076) | 0.657 (0.019)
manual prompt       | 0.828         | 0.769
in-context demo     | 0.859 (0.007) | 0.749 (0.008)
instructions        | 0.890         | 0.548
GrIPS               | 0.871 (0.015) | 0.654 (0.098)
RLPrompt            | 0.905 (0.015) | 0.797 (0.021)
token guidance, avg | 0.926 (0.017) | 0.828 (0.015)
token guidance, min | 0.919 (0.018) | 0.824 (0.011)
token guidance, max | 0.912 (0.025) | 0.833 (0.014)"""
# Yang et al. 2023, ROUGE and METEOR (std).
SUMMARIZE = """token guidance, avg | 0.4309 (0.0006) | 0.2017 (0.0004) | 0.3999 (0.0007) | 0.3523 (0.0006)
token guidance, sum | 0.4286 (0.0008) | 0.1992 (0.0008) | 0.3976 (0.0011) | 0.3474 (0.0037)
token guidance, min | 0.4292 (0.0014) | 0.2001 (0.0002) | 0.3984 (0.0008) | 0.3488 (0.0013)
token guidance, max | 0.4238 (0.0017) | 0.1949 (0.0002) | 0.3934 (0.0009) | 0.3413 (0.0032)
supervised          | - | - | 0.343 | -
supervised + PPO    | - | - | 0.363 | -
supervised + NLPO   | - | - | 0.363 | -"""
# Yin et al. 2025, PPO with rewards of segments, tokens or whole answers; win rates and a score by a large
# judge model.
EDITS = """Phi-3-mini, segment  | 31.05 | 34.0 | 7.65
Phi-3-mini, token    | 27.82 | 27.2 | 7.58
Phi-3-mini, bandit   | 27.05 | 31.3 | 7.46
Llama-3 8B, segment  | 25.11 | 30.4 | 7.15
Llama-3 8B, token    | 23.84 | 26.0 | 7.13
Llama-3 8B, bandit   | 21.20 | 18.7 | 7.11"""

# {task: (paper, what was measured, columns, rows, a sentence more)}
XU = "Xu et al. 2024 report up to 5.1 points of win rate of dense over sequence-level PPO (AlpacaFarm, 7 B)."
PAPERS = {
    "prompt": ("Yang et al. 2023", "test accuracy (std) of a RoBERTa-large judge",
               ("SST-2", "AG News"), PROMPT, ""),
    "summarize": ("Yang et al. 2023", "T5-base (std); stemmed ROUGE, full METEOR, most likely CNN/DailyMail",
                  ("rouge1", "rouge2", "rougeL", "meteor"), SUMMARIZE, ""),
    "edits": ("Yin et al. 2025", "PPO of large models under a judge model",
              ("AlpacaEval 2 LC", "Arena-Hard", "MT-Bench"), EDITS, XU),
}
