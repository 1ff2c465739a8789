"""From logits to tokens: the numpy sampler, the oracle of the native one.

For each row, in this order:

1. Penalties and biases, in float32, each token's logit once and in this order: the repetition
   penalty divides the positive and multiplies the other logits of the tokens in the row's history
   (Keskar et al. 2019, "CTRL"); of the tokens in the history's output part, `frequency_penalty`
   times their count there, plus `presence_penalty`, is subtracted (OpenAI's API); a bias is added.
2. Suppressed tokens get -inf.
3. A temperature below `GREEDY_TEMPERATURE` takes the largest logit, of equal ones the lowest id.
   Otherwise the weights are exp((logit - largest logit) / temperature), in float64.
4. `min_p` keeps the weights of at least `min_p` times the largest.
5. `top_k` keeps the k largest, of equal ones the lowest ids.
6. `top_p` keeps the shortest run of what is left, largest first and of equal ones lowest id
   first, that holds at least `top_p` of its sum.
7. The token is found by inverting the running sum of the kept weights, in float64 and in
   ascending order of id: the first one at which the sum exceeds u times the total, where u is
   the row's random number (`philox.uniform`).

Log-probabilities are those of the raw logits, before any of this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.scheduler.params import GREEDY_TEMPERATURE
from furiosa_llm.workers.executor import Float32, Int32, StepBatch, StepResult
from furiosa_llm.workers.philox import Float64, uniform

Ids = NDArray[np.integer]


def sample(logits: Float32, batch: StepBatch) -> StepResult:
    """Sample one token for each row of `batch.sample_rows`.

    Args:
        logits: (S, vocab) float32, left as they are.
        batch: the step that made them.
    Returns: the step's result.
    Raises: FuriosaLLMError for logits that are not finite; InvalidRequestError if a row's every
        token is suppressed.
    """
    num_samples = len(batch.sample_rows)
    draws = uniform(batch.seed, sampled_positions(batch), batch.choice_index)
    token_ids = np.empty(num_samples, np.int32)
    for i in range(num_samples):
        if not np.isfinite(logits[i]).all():
            raise FuriosaLLMError(f"row {i}: the model's logits are NaN or infinite")
        adjusted = _adjusted(logits[i], batch, i)
        if batch.temperature[i] < GREEDY_TEMPERATURE:
            token_ids[i] = np.argmax(adjusted)
            continue
        token_ids[i] = draw_token(
            adjusted,
            draws[i],
            temperature=float(batch.temperature[i]),
            top_k=int(batch.top_k[i]),
            top_p=float(batch.top_p[i]),
            min_p=float(batch.min_p[i]),
        )
    return _with_logprobs(logits, token_ids, batch.num_logprobs)


def sampled_positions(batch: StepBatch) -> Int32:
    """(S,) the absolute position of each token that is sampled."""
    rows = batch.sample_rows
    row_lens = batch.row_offsets[rows + 1] - batch.row_offsets[rows]
    positions: Int32 = batch.context_lens[rows] + row_lens
    return positions


def draw_token(
    logits: Float32, u: float, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """The token that the random number `u` picks (steps 3 to 7 of the module's plan).

    Args:
        logits: (vocab,) float32, penalties applied; at least one is finite.
        u: in [0, 1).
        temperature: at least `GREEDY_TEMPERATURE`.
        top_k, top_p, min_p: 0, 1.0 and 0.0 are off.
    """
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    kept_ids: Ids = np.flatnonzero(weights >= min_p)
    if 0 < top_k < len(kept_ids):
        kept_ids = _largest_first(weights, kept_ids)[:top_k]
    if top_p < 1:
        kept_ids = _largest_first(weights, kept_ids)
        sums = np.cumsum(weights[kept_ids])
        kept_ids = kept_ids[: int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1]
    kept_ids = np.sort(kept_ids)
    sums = np.cumsum(weights[kept_ids])
    return int(kept_ids[np.searchsorted(sums, u * sums[-1], side="right")])


def _adjusted(logits: Float32, batch: StepBatch, i: int) -> Float32:
    """The row's logits after steps 1 and 2; a copy only if something changes."""
    history = batch.history_ids[batch.history_offsets[i] : batch.history_offsets[i + 1]]
    suppressed = batch.suppressed_ids[batch.suppressed_offsets[i] : batch.suppressed_offsets[i + 1]]
    biased = slice(batch.bias_offsets[i], batch.bias_offsets[i + 1])
    if not len(suppressed) and not len(history) and biased.start == biased.stop:
        return logits
    adjusted = logits.copy()
    penalty = batch.repetition_penalty[i]
    if penalty != 1:
        seen = np.unique(history)
        values = adjusted[seen]
        adjusted[seen] = np.where(values > 0, values / penalty, values * penalty)
    presence, frequency = batch.presence_penalty[i], batch.frequency_penalty[i]
    if presence != 0 or frequency != 0:
        seen, counts = np.unique(history[batch.history_prompt_lens[i] :], return_counts=True)
        adjusted[seen] -= frequency * counts.astype(np.float32) + presence
    adjusted[batch.bias_ids[biased]] += batch.bias_values[biased]
    adjusted[suppressed] = -np.inf
    if len(suppressed) and adjusted.max() == -np.inf:
        raise InvalidRequestError(f"row {i}: every token is suppressed, so none can be sampled")
    return adjusted


def _largest_first(weights: Float64, ids: Ids) -> Ids:
    """`ids` by falling weight; a stable sort leaves equal ones in ascending order of id."""
    ordered: Ids = ids[np.argsort(-weights[ids], kind="stable")]
    return ordered


def _with_logprobs(logits: Float32, token_ids: Int32, num_logprobs: Int32) -> StepResult:
    """The result, its log-probability fields filled for the rows that asked (zeros elsewhere)."""
    num_samples = len(token_ids)
    num_columns = max(0, int(num_logprobs.max(initial=0)))
    result = StepResult(
        token_ids=token_ids,
        logprobs=np.zeros(num_samples, np.float32),
        ranks=np.zeros(num_samples, np.int32),
        top_token_ids=np.full((num_samples, num_columns), -1, np.int32),
        top_logprobs=np.zeros((num_samples, num_columns), np.float32),
    )
    for i in np.flatnonzero(num_logprobs >= 0):
        scores = logits[i].astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        result.logprobs[i] = scores[token_ids[i]]
        result.ranks[i] = 1 + np.count_nonzero(logits[i] > logits[i, token_ids[i]])
        num_top = min(int(num_logprobs[i]), len(scores))
        top_ids = _likeliest(logits[i], num_top)
        result.top_token_ids[i, :num_top] = top_ids
        result.top_logprobs[i, :num_top] = scores[top_ids]
    return result


def _likeliest(logits: Float32, num_top: int) -> Ids:
    """Ids of the `num_top` largest logits, largest first and of equal ones the lowest id first."""
    if num_top == 0:
        return np.empty(0, np.int64)
    # Everything that ties with the last place takes part in the sort, so that ids decide it.
    threshold = np.partition(logits, len(logits) - num_top)[len(logits) - num_top]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:num_top]
