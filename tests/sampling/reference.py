"""What sampling means, written the straight way: numpy, float64, one row at a time, with a sort."""

import numpy as np

from jaxpaged.sampling_params import SamplingParams


def adjusted_logits(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], bias: np.ndarray | None
) -> np.ndarray:
    """Logits [V] after bias and penalties."""
    adjusted = np.array(logits, np.float32)
    if bias is not None:
        adjusted += bias
    for token in set(prompt) | set(output):
        penalty = np.float32(params.repetition_penalty)
        adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
    for token in set(output):
        count = output.count(token)
        adjusted[token] -= params.frequency_penalty * count + params.presence_penalty
    return adjusted


def distribution(adjusted: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities [V] that a token is drawn with; ties at a threshold are all kept."""
    adjusted = adjusted.astype(np.float64)
    if params.temperature == 0:
        return np.eye(len(adjusted))[np.argmax(adjusted)]
    weight = np.exp((adjusted - adjusted.max()) / np.float32(params.temperature))
    weight[weight < np.float32(params.min_p)] = 0
    if 0 < params.top_k < len(adjusted):
        weight[adjusted < np.sort(adjusted)[-params.top_k]] = 0
    if params.top_p < 1:
        descending = np.sort(weight)[::-1]
        enough = np.cumsum(descending) >= np.float32(params.top_p) * weight.sum()
        weight[weight < descending[np.argmax(enough)]] = 0
    return weight / weight.sum()


def boundary_gap(adjusted: np.ndarray, params: SamplingParams) -> float:
    """How far, relatively, top-p and min-p are from keeping a token more or less."""
    adjusted = adjusted.astype(np.float64)
    if params.temperature == 0:
        return 1.0
    weight = np.exp((adjusted - adjusted.max()) / np.float32(params.temperature))
    gap = np.abs(weight - params.min_p).min() if params.min_p > 0 else 1.0
    weight[weight < np.float32(params.min_p)] = 0
    if 0 < params.top_k < len(adjusted):
        weight[adjusted < np.sort(adjusted)[-params.top_k]] = 0
    if params.top_p < 1:
        share = np.cumsum(np.sort(weight)[::-1]) / weight.sum()
        gap = min(gap, np.abs(share - params.top_p).min())
    return float(gap)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [V] in float64."""
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
