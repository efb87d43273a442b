// Products of tiles: oneDNN's micro-kernels (AMX, AVX-512 BF16 or plain AVX-512) through ATen, on operands packed into
// panels of 64 columns. Sums are fp32 whatever the operands; a 16-bit tile of logits never exists.
#pragma once
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>
#include <vector>

#include "rows.h"

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would be a plain loop on one core: compile with -fopenmp"
#endif

namespace sophiavl {

using at::BFloat16;
using at::Half;
using at::Tensor;

constexpr int64_t BLOCK = 64;     // rows of a product

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many numbers of P share a 32-bit word: the unit in which the inner dimension is packed and padded.
template <class P> constexpr int64_t GROUP = 4 / sizeof(P);

// Longest sum that one call of a micro-kernel runs over: short enough for the cache, and for fp32 sums to keep their digits.
template <class P> constexpr int64_t DEPTH = 2048 / sizeof(P);

template <class P> P* data(const Tensor& t) { return static_cast<P*>(t.data_ptr()); }
template <class P> Tensor buffer(int64_t numbers) { return at::empty({std::max<int64_t>(numbers, 1)}, at::CppTypeToScalarType<P>::value); }

// c [m, n] = or += a [m, k] b [k, n], b a panel of 64 columns
template <class P> void multiply(int64_t m, int64_t n, int64_t k, const P* a, int64_t lda, const P* b, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, PANEL, ldc, add, a, b, c, /*is_vnni=*/GROUP<P> == 2);
}

// c [m, 64 panels] = a [m, k] times panels of b [k, 64] that lie `stride` numbers apart; long sums in steps that leave a's and b's parts in the
// second-level cache
template <class P> void multiply_panels(int64_t m, int64_t panels, int64_t k, const P* a, const P* b, int64_t stride, float* c, int64_t ldc) {
  for (int64_t i = 0; i < k; i += DEPTH<P>)
    for (int64_t j = 0; j < panels; ++j) multiply(m, PANEL, std::min(DEPTH<P>, k - i), a + i, k, b + j * stride + i * PANEL, c + j * PANEL, ldc, i > 0);
}

// Run task(0..tasks-1), each worker taking the next: a worker that is held up holds up no other.
template <class F> void share(int64_t tasks, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(i);
    at::native::cpublas::brgemm_release();
  });
}

// Rows of a matrix In [*, width] as P, [rounded up to 16, width rounded up to GROUP]: in place where they already lie so.
template <class In, class P> struct Rows {
  const P* at;
  int64_t count, padded, stride;
  Tensor own;

  Rows(const In* source, const int64_t* index, int64_t first, int64_t n, int64_t width)
      : count(n), padded(round_up(n, 16)), stride(round_up(width, GROUP<P>)) {
    if (std::is_same_v<In, P> && index == nullptr && padded == n && stride == width) {
      at = reinterpret_cast<const P*>(source) + first * width;
      return;
    }
    own = buffer<P>(padded * stride);
    P* out = data<P>(own);
    at = out;
    at::parallel_for(0, padded, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const In* in = source + (r >= n ? 0 : index == nullptr ? first + r : index[r]) * width;
        const int64_t there = r < n ? width : 0;
        for (int64_t i = 0; i < there; ++i) out[r * stride + i] = static_cast<P>(in[i]);
        std::fill(out + r * stride + there, out + (r + 1) * stride, P(0));
      }
    });
  }
};

// Up to 64 rows of the weight as P: where they lie, or converted into `scratch` [64, width].
template <class In, class P> const P* as(const In* rows, int64_t n, int64_t width, P* scratch) {
  if constexpr (std::is_same_v<In, P>) return rows;
  for (int64_t i = 0; i < n * width; ++i) scratch[i] = static_cast<P>(rows[i]);
  return scratch;
}

// A panel of weight rows as the right operand of hidden @ weight.T: [inner / GROUP][64][GROUP].
template <class P> void pack_transposed(const RowKernels& k, const P* rows, int64_t n, int64_t width, P* out, int64_t inner) {
  k.transpose_words(rows, n, width * sizeof(P), width * sizeof(P), reinterpret_cast<uint32_t*>(out), inner / GROUP<P>, PANEL);
}

// Rows as the right operand of a product over them: one panel for each 64 columns, [depth / GROUP][64][GROUP].
template <class P> void pack_rows(const RowKernels& k, const P* rows, int64_t n, int64_t width, P* out, int64_t depth, int64_t panel_stride) {
  for (int64_t h = 0; h < width; h += PANEL, out += panel_stride) {
    const int64_t cols = std::min(PANEL, width - h);
    if constexpr (GROUP<P> == 2) {
      k.interleave(reinterpret_cast<const uint16_t*>(rows + h), n, cols, width, reinterpret_cast<uint32_t*>(out), depth / 2);
    } else {
      for (int64_t r = 0; r < depth; ++r) {
        const int64_t there = r < n ? cols : 0;
        std::copy_n(rows + r * width + h, there, out + r * PANEL);
        std::fill(out + r * PANEL + there, out + (r + 1) * PANEL, P(0));
      }
    }
  }
}

// bf16 operands stay bf16 where the processor multiplies them; else, and for fp16, tiles are widened to fp32.
inline bool multiplies_bf16(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const bool able = __builtin_cpu_supports("avx512bf16");
  return able && at::globalContext().userEnabledMkldnn() && (isa == Isa::automatic ? best_isa() : isa) == Isa::avx512;
#else
  return false;
#endif
}

// f(In{}, P{}) for the dtype of the inputs.
template <class F> auto dispatch(at::ScalarType type, Isa isa, const F& f) {
  switch (type) {
    case at::kFloat: return f(float{}, float{});
    case at::kHalf: return f(Half{}, float{});
    case at::kBFloat16: return multiplies_bf16(isa) ? f(BFloat16{}, BFloat16{}) : f(BFloat16{}, float{});
    default: TORCH_CHECK(false, "hidden: expected float32, bfloat16 or float16, not ", type);
  }
}

}  // namespace sophiavl
