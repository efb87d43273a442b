// Forward pass of linear_logprob: [4, T] statistics of hidden @ weight.T, a tile of tokens x vocabulary at a time.
#include "linear_logprob.h"

namespace sophiavl {

namespace {

constexpr int64_t PACKED = 1 << 19;    // bytes of packed weight that a worker goes over the tokens with: half a second-level cache, the rest for rows and logits
constexpr int64_t COPIED = 16 << 20;   // bytes of hidden rows that are copied at a time where they cannot be used in place
constexpr State NONE = {0, 0, -3.4028234663852886e38f, -INFINITY};

// One worker's share: tokens [first, last) of `rows` against vocabulary [begin, end).
template <class In, class P> void scan(const Problem& p, const Rows<In, P>& rows, const int64_t* column, int64_t tile, int64_t begin, int64_t end,
                                       int64_t first, int64_t last, State* states) {
  const int64_t inner = rows.stride;
  Tensor packed = buffer<P>(tile * inner), logits = buffer<float>(BLOCK * tile), scratch;
  if (!std::is_same_v<In, P>) scratch = buffer<P>(PANEL * p.width);
  for (int64_t v = begin; v < end; v += tile) {
    const int64_t cols = std::min(tile, end - v), panels = (cols + PANEL - 1) / PANEL;
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t n = std::min(PANEL, cols - j * PANEL);
      const P* source = as(p.rows_of_weight<In>(v + j * PANEL), n, p.width, scratch.defined() ? data<P>(scratch) : nullptr);
      pack_transposed(*p.kernels, source, n, p.width, data<P>(packed) + j * PANEL * inner, inner);
    }
    for (int64_t t = first; t < last; t += BLOCK) {
      const int64_t count = std::min(BLOCK, last - t), padded = round_up(count, 16);
      Tile c{data<float>(logits), tile, count, panels * PANEL, v, p.bias_at(v), p.scale};
      multiply_panels(padded, panels, inner, rows.at + t * inner, data<P>(packed), PANEL * inner, c.c, tile);
      if (p.products_only) continue;
      hide_padding(c, cols);
      p.kernels->statistics(c, column + t, states + t, p.entropy);
    }
  }
}

State merged(const State& a, const State& b) {
  State out = a.top >= b.top ? a : b;
  const State& low = a.top >= b.top ? b : a;
  const double gap = std::max(static_cast<double>(low.top) - out.top, -1000.0), factor = std::exp(gap);
  out.sum += factor * low.sum;
  out.weighted += factor * (low.weighted + gap * low.sum);
  out.target = a.target == -INFINITY ? b.target : a.target;
  return out;
}

}  // namespace

template <class In, class P> void statistics(const Problem& p, const In* hidden, int64_t tokens, const int64_t* column, float* out) {
  const int64_t inner = round_up(p.width, GROUP<P>), workers = at::get_num_threads();
  const int64_t tile = std::clamp<int64_t>(PACKED / (inner * sizeof(P)) / PANEL * PANEL, PANEL, std::clamp<int64_t>(round_up(p.valid, PANEL), PANEL, 512));
  const int64_t tiles = (p.valid + tile - 1) / tile;
  const bool in_place = std::is_same_v<In, P> && inner == p.width && tokens % 16 == 0;
  const int64_t chunk = in_place ? std::max<int64_t>(tokens, 1) : std::max<int64_t>(COPIED / (inner * sizeof(P)) / BLOCK * BLOCK, BLOCK);
  for (int64_t start = 0; start < tokens; start += chunk) {
    const int64_t n = std::min(chunk, tokens - start), blocks = (n + BLOCK - 1) / BLOCK;
    Rows<In, P> rows(hidden, nullptr, start, n, p.width);
    // ranges of the vocabulary first: they share no packed weight
    const int64_t ranges = std::min(tiles, std::clamp<int64_t>(4 * workers, 1, std::max<int64_t>(workers, 32)));
    const int64_t splits = std::clamp<int64_t>(2 * workers / std::max<int64_t>(ranges, 1), 1, blocks);
    std::vector<State> states(ranges * n, NONE);
    share(ranges * splits, [&](int64_t i) {
      const int64_t range = i / splits, split = i % splits;
      const int64_t begin = tiles * range / ranges * tile, end = std::min(tiles * (range + 1) / ranges * tile, p.valid);
      const int64_t first = blocks * split / splits * BLOCK, last = std::min(blocks * (split + 1) / splits * BLOCK, n);
      scan<In, P>(p, rows, column + start, tile, begin, end, first, last, states.data() + range * n);
    });
    at::parallel_for(0, n, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        State s = ranges > 0 ? states[t] : NONE;
        for (int64_t r = 1; r < ranges; ++r) s = merged(s, states[r * n + t]);
        const float values[] = {s.top, static_cast<float>(s.sum), static_cast<float>(s.weighted), s.target};
        for (int64_t i = 0; i < 4; ++i) out[i * tokens + start + t] = values[i];
      }
    });
  }
}

template void statistics<float, float>(const Problem&, const float*, int64_t, const int64_t*, float*);
template void statistics<Half, float>(const Problem&, const Half*, int64_t, const int64_t*, float*);
template void statistics<BFloat16, float>(const Problem&, const BFloat16*, int64_t, const int64_t*, float*);
template void statistics<BFloat16, BFloat16>(const Problem&, const BFloat16*, int64_t, const int64_t*, float*);

}  // namespace sophiavl
