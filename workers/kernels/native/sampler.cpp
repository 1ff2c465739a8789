#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "failure.h"
#include "philox.h"

namespace furiosa {

namespace {

constexpr float kGreedyTemperature = 1e-5f;  // scheduler/params.py
constexpr int kBlock = 64;

// Logits that were penalised, biased or suppressed, which `undo` puts back.
class Edits {
 public:
  explicit Edits(const SamplerScratch& scratch) : scratch_(scratch) {}

  void set(float* logits, int32_t id, float value) {
    scratch_.edited[count_] = id;
    scratch_.originals[count_++] = logits[id];
    logits[id] = value;
  }
  void undo(float* logits) {
    while (count_ > 0) {
      --count_;
      logits[scratch_.edited[count_]] = scratch_.originals[count_];
    }
  }

 private:
  const SamplerScratch& scratch_;
  int count_ = 0;
};

bool has_penalty(const FsBatch& batch, int index) {
  return batch.repetition_penalty[index] != 1.0f || batch.presence_penalty[index] != 0.0f ||
         batch.frequency_penalty[index] != 0.0f;
}

bool is_edited(const FsBatch& batch, int index) {
  return batch.suppressed_offsets[index + 1] > batch.suppressed_offsets[index] ||
         batch.bias_offsets[index + 1] > batch.bias_offsets[index] ||
         (has_penalty(batch, index) &&
          batch.history_offsets[index + 1] > batch.history_offsets[index]);
}

// The penalties of rule 1, to each token of the history once, however often it occurs.
void penalise(float* logits, const FsBatch& batch, int index, const SamplerScratch& scratch,
              Edits& edits) {
  const float repetition = batch.repetition_penalty[index];
  const float presence = batch.presence_penalty[index];
  const float frequency = batch.frequency_penalty[index];
  const int begin = batch.history_offsets[index], end = batch.history_offsets[index + 1];
  for (int i = begin + batch.history_prompt_lens[index]; i < end; ++i) {
    ++scratch.counts[batch.history_ids[i]];
  }
  for (int i = begin; i < end; ++i) {
    const int32_t id = batch.history_ids[i];
    if (scratch.is_seen[id] != 0) continue;
    scratch.is_seen[id] = 1;
    float value = logits[id];
    if (repetition != 1.0f) value = value > 0 ? value / repetition : value * repetition;
    const int32_t count = scratch.counts[id];
    if (count > 0) value -= frequency * static_cast<float>(count) + presence;
    edits.set(logits, id, value);
  }
  for (int i = begin; i < end; ++i) {
    scratch.is_seen[batch.history_ids[i]] = 0;
    scratch.counts[batch.history_ids[i]] = 0;
  }
}

// Rules 1 and 2: at most 3 vocab edits, for each part of them meets a token once.
void edit(float* logits, const FsBatch& batch, int index, const SamplerScratch& scratch,
          Edits& edits) {
  if (has_penalty(batch, index)) penalise(logits, batch, index, scratch, edits);
  for (int i = batch.bias_offsets[index]; i < batch.bias_offsets[index + 1]; ++i) {
    const int32_t id = batch.bias_ids[i];
    edits.set(logits, id, logits[id] + batch.bias_values[i]);
  }
  for (int i = batch.suppressed_offsets[index]; i < batch.suppressed_offsets[index + 1]; ++i) {
    const int32_t id = batch.suppressed_ids[i];
    if (logits[id] != -INFINITY) edits.set(logits, id, -INFINITY);
  }
}

int32_t first_equal(const float* logits, int vocab_size, float value) {
  return static_cast<int32_t>(std::find(logits, logits + vocab_size, value) - logits);
}

float largest_of(const float* logits, int vocab_size) {
  float largest = -INFINITY;
  for (int id = 0; id < vocab_size; ++id) largest = logits[id] > largest ? logits[id] : largest;
  return largest;
}

// A bound that at least k weights reach, and not many more: the k-th largest of the blocks' maxima.
// 0 when there are not that many blocks.
double bound_of_largest(const SamplerScratch& scratch, int vocab_size, int k) {
  const int num_blocks = (vocab_size + kBlock - 1) / kBlock;
  if (k > num_blocks) return 0;
  for (int block = 0; block < num_blocks; ++block) {
    const int end = std::min((block + 1) * kBlock, vocab_size);
    double largest[4] = {0, 0, 0, 0};  // four, so as not to wait for one
    for (int id = block * kBlock; id < end; ++id) {
      largest[id % 4] = std::max(largest[id % 4], scratch.weights[id]);
    }
    scratch.block_max[block] =
        std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
  }
  double* bound = scratch.block_max + k - 1;
  std::nth_element(scratch.block_max, bound, scratch.block_max + num_blocks, std::greater<>());
  return *bound;
}

// The ids whose weight reaches the bound, ascending, into scratch.ids. Returns how many.
int collect(const SamplerScratch& scratch, int vocab_size, double bound) {
  int count = 0;
  for (int id = 0; id < vocab_size; ++id) {
    scratch.ids[count] = id;
    count += scratch.weights[id] >= bound ? 1 : 0;
  }
  return count;
}

// Keeps of ids[0 .. count] the shortest run, heaviest first, that holds `top_p` of their weight,
// in the front and in no particular order. Returns how many.
int keep_nucleus(int32_t* ids, int count, const double* weights, double top_p) {
  constexpr int kSortable = 64;
  const auto is_heavier = [weights](int32_t a, int32_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
  };
  double total = 0;
  for (int i = 0; i < count; ++i) total += weights[ids[i]];
  // Together, weights below this hold less than half of what the nucleus leaves out.
  const double negligible = 0.5 * (1.0 - top_p) * total / count;
  int num_left = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t id = ids[i];
    ids[num_left] = id;
    num_left += weights[id] >= negligible ? 1 : 0;
  }
  // ids[0 .. begin] are in the nucleus and weigh `sum`; ids[end ..] are not. Halving what lies
  // between takes time in proportion to count.
  double sum = 0;
  int begin = 0, end = num_left;
  while (end - begin > kSortable) {
    const int middle = begin + (end - begin) / 2;
    std::nth_element(ids + begin, ids + middle, ids + end, is_heavier);
    double heavier = 0;
    for (int i = begin; i < middle; ++i) heavier += weights[ids[i]];
    if (sum + heavier >= top_p * total) {
      end = middle;
    } else {
      sum += heavier;
      begin = middle;
    }
  }
  std::sort(ids + begin, ids + end, is_heavier);
  for (int i = begin; i < end; ++i) {
    sum += weights[ids[i]];
    if (sum >= top_p * total) return i + 1;
  }
  return end;
}

// The first id at which the running sum exceeds u times the total; ids ascend. `id_at(i)` names
// the i-th of `count` ids.
template <class IdAt>
int32_t invert_sum(const double* weights, int count, double u, IdAt id_at) {
  double total = 0;
  for (int i = 0; i < count; ++i) total += weights[id_at(i)];
  double sum = 0;
  int32_t last = id_at(0);
  for (int i = 0; i < count; ++i) {
    const int32_t id = id_at(i);
    if (weights[id] == 0) continue;
    last = id;
    sum += weights[id];
    if (sum > u * total) return id;
  }
  return last;  // u * total can round up to the total
}

// Rules 3 to 7, temperature above greedy; `largest` is the largest of the edited logits.
int32_t draw(const KernelTable& kernels, const FsBatch& batch, int index, const float* logits,
             float largest, int vocab_size, const SamplerScratch& scratch) {
  double* weights = scratch.weights;
  kernels.exp_double(weights, logits, vocab_size, largest, batch.temperature[index]);
  const int row = batch.sample_rows[index];
  const int32_t position =
      batch.context_lens[row] + batch.row_offsets[row + 1] - batch.row_offsets[row];
  const double u = uniform(batch.seed[index], position, batch.choice_index[index]);

  const double min_p = batch.min_p[index], top_p = batch.top_p[index];
  const int top_k = batch.top_k[index];
  if (min_p <= 0 && top_p >= 1 && (top_k <= 0 || top_k >= vocab_size)) {
    return invert_sum(weights, vocab_size, u, [](int i) { return i; });
  }
  int32_t* ids = scratch.ids;
  const double bound = top_k > 0 ? bound_of_largest(scratch, vocab_size, top_k) : 0;
  int count = collect(scratch, vocab_size, std::max(min_p, bound));
  if (top_k > 0 && top_k < count) {
    std::nth_element(ids, ids + top_k - 1, ids + count, [weights](int32_t a, int32_t b) {
      return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
    });
    count = top_k;
    if (top_p < 1) std::sort(ids, ids + count);  // sums are taken in ascending order
  }
  if (top_p < 1) count = keep_nucleus(ids, count, weights, top_p);
  std::sort(ids, ids + count);
  return invert_sum(weights, count, u, [ids](int i) { return ids[i]; });
}

// Log-probabilities of the raw logits: the sampled token's, its rank, and the likeliest few.
void report(const KernelTable& kernels, const FsBatch& batch, int index, const float* logits,
            float largest, int vocab_size, const SamplerScratch& scratch, const FsResult& result) {
  kernels.exp_double(scratch.weights, logits, vocab_size, largest, 1.0);
  double total = 0;
  for (int id = 0; id < vocab_size; ++id) total += scratch.weights[id];
  const double log_total = std::log(total) + largest;
  const float sampled = logits[result.token_ids[index]];
  int rank = 1;
  for (int id = 0; id < vocab_size; ++id) rank += logits[id] > sampled ? 1 : 0;
  result.logprobs[index] = static_cast<float>(sampled - log_total);
  result.ranks[index] = rank;

  const int num_top = std::min(batch.num_logprobs[index], vocab_size);
  if (num_top == 0) return;
  // Weights never fall as logits rise, so that the likeliest reach the bound.
  int32_t* ids = scratch.ids;
  const int count = collect(scratch, vocab_size, bound_of_largest(scratch, vocab_size, num_top));
  const auto is_likelier = [logits](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  std::partial_sort(ids, ids + num_top, ids + count, is_likelier);
  const int64_t first = static_cast<int64_t>(index) * batch.max_logprobs;
  for (int i = 0; i < num_top; ++i) {
    result.top_token_ids[first + i] = ids[i];
    result.top_logprobs[first + i] = static_cast<float>(logits[ids[i]] - log_total);
  }
}

}  // namespace

SamplerScratch SamplerScratch::from(Arena& arena, int vocab_size) {
  SamplerScratch scratch;
  scratch.weights = arena.take<double>(vocab_size);
  scratch.block_max = arena.take<double>((vocab_size + kBlock - 1) / kBlock);
  scratch.ids = arena.take<int32_t>(vocab_size);
  scratch.is_seen = arena.take<uint8_t>(vocab_size);
  scratch.counts = arena.take<int32_t>(vocab_size);
  scratch.edited = arena.take<int32_t>(int64_t{3} * vocab_size);
  scratch.originals = arena.take<float>(int64_t{3} * vocab_size);
  return scratch;
}

void throw_if_failed(SampleError error, int row) {
  if (error == SampleError::kNone) return;
  const std::string where = "row " + std::to_string(row);
  if (error == SampleError::kNotFinite) {
    throw Failure{kNotFinite, where + ": the model's logits are NaN or infinite"};
  }
  throw Failure{kInvalidBatch, where + ": every token of the vocabulary is suppressed"};
}

void Likeliest::add(const KernelTable& kernels, const float* logits, int32_t first, int count) {
  const float highest = kernels.max_finite(logits, count);
  if (std::isnan(highest)) {
    is_finite = false;
  } else if (highest > logit || (highest == logit && first < id)) {
    logit = highest, id = first + first_equal(logits, count, highest);
  }
}

bool asks_for_likeliest(const FsBatch& batch, int index) {
  return batch.temperature[index] < kGreedyTemperature && batch.num_logprobs[index] < 0 &&
         !is_edited(batch, index);
}

SampleError sample_row(const KernelTable& kernels, const FsBatch& batch, int index, float* logits,
                       int vocab_size, const SamplerScratch& scratch, const FsResult& result) {
  const float raw_largest = kernels.max_finite(logits, vocab_size);
  if (std::isnan(raw_largest)) return SampleError::kNotFinite;
  Edits edits(scratch);
  float largest = raw_largest;
  if (is_edited(batch, index)) {
    edit(logits, batch, index, scratch, edits);
    largest = largest_of(logits, vocab_size);
    if (largest == -INFINITY) return SampleError::kAllSuppressed;
  }
  result.token_ids[index] =
      batch.temperature[index] < kGreedyTemperature
          ? first_equal(logits, vocab_size, largest)
          : draw(kernels, batch, index, logits, largest, vocab_size, scratch);
  if (batch.num_logprobs[index] >= 0) {
    edits.undo(logits);
    report(kernels, batch, index, logits, raw_largest, vocab_size, scratch, result);
  }
  return SampleError::kNone;
}

}  // namespace furiosa
