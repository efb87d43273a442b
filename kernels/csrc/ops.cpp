// The ops sophiavl_cpu::{statistics, gradients, isas}, registered without Python: loaded by torch.ops.load_library.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "linear_logprob.h"

namespace sophiavl {

namespace {

constexpr double FLOOR = -1000.0;

Isa parse(std::string_view name) {
  const Isa isa = name == "auto" ? Isa::automatic : name == "scalar" ? Isa::scalar : name == "avx2" ? Isa::avx2 : Isa::avx512;
  TORCH_CHECK(name == "avx512" || isa != Isa::avx512, "isa = ", name, ": expected auto, scalar, avx2 or avx512");
  TORCH_CHECK(isa == Isa::automatic || supported(isa), "isa = ", name, ": this processor has no such instructions");
  return isa;
}

// Bias as fp32, with zeros up to a whole panel.
Tensor padded_bias(const std::optional<Tensor>& bias, int64_t valid) {
  if (!bias.has_value()) return {};
  Tensor out = at::zeros({round_up(valid, PANEL)}, at::kFloat);
  out.narrow(0, 0, valid).copy_(bias->narrow(0, 0, valid));
  return out;
}

Problem problem(const Tensor& weight, const Tensor& bias, int64_t valid, double temperature, bool entropy, bool products_only, Isa isa) {
  return {&kernels(isa), weight.data_ptr(), bias.defined() ? data<float>(bias) : nullptr, valid, weight.size(1),
          static_cast<float>(1.0 / temperature), entropy, products_only};
}

Tensor statistics_op(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& column, const Tensor& here,
                     int64_t valid, double temperature, bool entropy, bool products_only, std::string_view isa_name) {
  const Isa isa = parse(isa_name);
  const Tensor h = hidden.contiguous(), w = weight.contiguous(), b = padded_bias(bias, valid), at = column.masked_fill(here.logical_not(), -1).contiguous();
  Tensor out = at::empty({4, h.size(0)}, at::kFloat);
  const Problem p = problem(w, b, valid, temperature, entropy, products_only, isa);
  dispatch(h.scalar_type(), isa, [&]<class In, class P>(In, P) { statistics<In, P>(p, data<In>(h), h.size(0), data<int64_t>(at), data<float>(out)); });
  return out;
}

struct Given {
  Tensor column, here, live, top, total, logprob, entropy, g, h;  // contiguous, fp32; h may be undefined

  bool asks(int64_t t) const { return data<bool>(live)[t] && (data<float>(g)[t] != 0 || (h.defined() && data<float>(h)[t] != 0)); }

  Slope slope(int64_t t) const {
    const double total_t = data<float>(total)[t], logprob_t = data<float>(logprob)[t], entropy_t = data<float>(entropy)[t];
    const double up = data<float>(g)[t], spread = h.defined() ? data<float>(h)[t] : 0.0;
    double base = -up / total_t, own = -up * std::expm1(logprob_t);
    if (spread != 0) {
      base -= spread / total_t * (entropy_t - std::log(total_t));
      own -= spread * std::exp(logprob_t) * (std::max(logprob_t, FLOOR) + entropy_t);
    }
    return {data<float>(top)[t], static_cast<float>(base), static_cast<float>(spread / total_t), static_cast<float>(own),
            data<bool>(here)[t] ? data<int64_t>(column)[t] : -1};
  }
};

std::tuple<Tensor, Tensor, Tensor> gradients_op(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& column, const Tensor& here, const Tensor& live,
    const Tensor& top, const Tensor& total, const Tensor& logprob, const Tensor& entropy, const Tensor& g, const std::optional<Tensor>& h, int64_t valid,
    double temperature, const std::optional<Tensor>& active, bool wants_hidden, bool wants_weight, bool wants_bias,
    const std::optional<Tensor>& main_grad, std::string_view isa_name) {
  const Isa isa = parse(isa_name);
  TORCH_CHECK(!main_grad.has_value() || main_grad->is_contiguous(), "main_grad: expected a contiguous tensor");
  const Tensor x = hidden.contiguous(), w = weight.contiguous(), b = padded_bias(bias, valid);
  const auto wide = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const Given given{column.contiguous(), here.contiguous(), live.contiguous(), wide(top), wide(total), wide(logprob), wide(entropy), wide(g),
                    h.has_value() ? wide(*h) : Tensor()};
  std::vector<int64_t> rows;
  std::vector<Slope> slopes;
  const Tensor chosen = active.has_value() ? active->contiguous() : Tensor();
  const int64_t candidates = active.has_value() ? chosen.numel() : x.size(0);
  for (int64_t i = 0; i < candidates; ++i) {
    const int64_t t = active.has_value() ? data<int64_t>(chosen)[i] : i;
    TORCH_CHECK(t >= 0 && t < x.size(0), "active = ", t, ": expected rows in [0, ", x.size(0), ")");  // under torch.compile nobody has looked
    if (given.asks(t)) { rows.push_back(t); slopes.push_back(given.slope(t)); }
  }
  const bool in_order = std::is_sorted(rows.begin(), rows.end());
  const bool every = in_order && static_cast<int64_t>(rows.size()) == x.size(0);
  // a shard of padding alone adds nothing, and nothing below writes what it adds
  Tensor none, d_hidden = !wants_hidden ? none : every && valid > 0 ? at::empty_like(x) : at::zeros_like(x), d_weight, d_bias;
  const bool accumulate = main_grad.has_value();
  if (wants_weight && !accumulate) {
    d_weight = rows.empty() ? at::zeros_like(w) : at::empty_like(w);
    d_weight.narrow(0, valid, w.size(0) - valid).zero_();
  }
  if (wants_bias) d_bias = at::zeros({w.size(0)}, at::kFloat);
  const Gradients to{wants_hidden ? d_hidden.data_ptr() : nullptr, !wants_weight ? nullptr : accumulate ? main_grad->data_ptr() : d_weight.data_ptr(),
                     accumulate, wants_bias ? data<float>(d_bias) : nullptr};
  const Problem p = problem(w, b, valid, temperature, false, false, isa);
  if (!rows.empty() && valid > 0)
    dispatch(x.scalar_type(), isa, [&]<class In, class P>(In, P) { gradients<In, P>(p, data<In>(x), every, {rows, slopes}, to); });
  const auto given_or_none = [](const Tensor& t) { return t.defined() ? t : at::empty({0}); };
  return {given_or_none(d_hidden), given_or_none(d_weight), given_or_none(d_bias)};
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto [isa, name] : {std::pair{Isa::scalar, "scalar"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}})
    if (supported(isa)) names.emplace_back(name);
  return names;
}

}  // namespace

}  // namespace sophiavl

TORCH_LIBRARY(sophiavl_cpu, m) {
  m.def("isas() -> str[]", &sophiavl::isas);
  m.def("statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor column, Tensor here, int valid, float temperature, bool entropy, "
        "bool products_only=False, str isa=\"auto\") -> Tensor");
  m.def("gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor column, Tensor here, Tensor live, Tensor top, Tensor total, Tensor logprob, "
        "Tensor entropy, Tensor g, Tensor? h, int valid, float temperature, Tensor? active, bool wants_hidden, bool wants_weight, bool wants_bias, "
        "Tensor(a!)? main_grad, str isa=\"auto\") -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sophiavl_cpu, CPU, m) {
  m.impl("statistics", &sophiavl::statistics_op);
  m.impl("gradients", &sophiavl::gradients_op);
}
