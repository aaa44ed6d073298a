// The operators: shapes are checked, memory is laid out, and the work is shared among threads. The arithmetic is in
// kernel.inl.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "layer.h"
#include "memory.h"

namespace gatedprune {
namespace {

using at::Tensor;
using std::optional;

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* find(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name == "avx512" || name == "best") && kernels_avx512()) return kernels_avx512();
  if (avx2 && (name == "avx2" || name == "best") && kernels_avx2()) return kernels_avx2();
#endif
  return name == "generic" || name == "best" ? kernels_generic() : nullptr;
}

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = find("best"));
  return *k;
}

// The instruction set in use; a name sets it, for tests and comparisons. "" where this CPU does not have it.
std::string instruction_set(const std::string& name) {
  if (!name.empty()) {
    const Kernels* k = find(name);
    if (!k) return "";
    chosen.store(k);
  }
  return kernels().name;
}

// The kernel for bfloat16 weights, or null.
const PairKernels* pair_kernels() { return std::strcmp(kernels().name, "avx512") ? nullptr : kernels_bfloat16(); }

// Whether the CPU multiplies bfloat16 numbers.
bool multiplies_bfloat16() { return pair_kernels(); }

Activation activation_of(c10::string_view name) {
  if (name == "") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  if (name == "hardswish") return Activation::hardswish;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  TORCH_CHECK(false, "unknown activation ", std::string(name));
}

enum class Use { kernel, weights };

template <Use = Use::kernel>
float* scratch_memory(int64_t floats) {
  thread_local Scratch memory;
  return memory.floats(floats);
}

void check_index(const optional<Tensor>& index, int64_t limit, const char* what) {
  if (!index) return;
  TORCH_CHECK(index->dim() == 2 && index->scalar_type() == at::kLong && index->device().is_cpu(), what,
              " must be (B, n), int64, on the CPU");
  const Tensor c = index->contiguous();
  const int64_t* p = c.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < c.numel(); i++)
    TORCH_CHECK_INDEX(p[i] >= 0 && p[i] < limit, what, " is ", p[i], ", outside [0, ", limit, ")");
}

optional<Tensor> contiguous(const optional<Tensor>& t) {
  return t ? optional<Tensor>(t->contiguous()) : std::nullopt;
}

// As it is where only its rows lie apart.
Tensor with_rows(const Tensor& weight) {
  int64_t row = 1;
  bool dense = true;
  for (int64_t d = weight.dim() - 1; d > 0; row *= weight.size(d--)) dense &= weight.size(d) == 1 || weight.stride(d) == row;
  return dense && weight.stride(0) >= row ? weight : weight.contiguous();
}

// In float32 where the CPU has no kernel for bfloat16.
Tensor readable(const Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 && !pair_kernels() ? weight.to(at::kFloat) : weight;
}

template <typename T>
const T* row_of(const optional<Tensor>& t, int64_t row) {
  return t ? t->const_data_ptr<T>() + row * t->size(1) : nullptr;
}

// A weight as its kernel reads it: `sample` floats from one sample's to the next one's, rows `ldw` apart. bfloat16: in
// pairs, either where they lie, or `gathered`: the active rows and columns side by side, since what is active need not lie
// in pairs. Row by row that takes a fraction of the time of the products.
struct Weights {
  const float* data;
  int64_t ldw, sample = 0, depth, row_length;
  const bool pairs;
  bool gathered = false;
  std::vector<int32_t> columns;  // (samples, depth); one sample's serve all where they are pairs

  Weights(const Tensor& weight, const optional<Tensor>& in_index, const optional<Tensor>& out_index, int64_t samples,
          int64_t channels, int64_t each)
      : pairs(weight.scalar_type() == at::kBFloat16) {
    if (!pairs) {
      data = weight.const_data_ptr<float>();
      ldw = weight.stride(0);
      depth = channels * each;
      row_length = weight.numel() / std::max<int64_t>(1, weight.size(0));
      columns.resize(samples * depth);
      for (int64_t s = 0; s < samples; s++) {
        const int64_t* active = row_of<int64_t>(in_index, s);
        int32_t* to = columns.data() + s * depth;
        for (int64_t j = 0; j < channels; j++)
          for (int64_t t = 0; t < each; t++) *to++ = int32_t((active ? active[j] : j) * each + t);
      }
      return;
    }
    depth = row_length = (channels * each + 1) / 2;
    columns.resize(depth);
    std::iota(columns.begin(), columns.end(), 0);
    const int64_t row = weight.stride(0), whole = weight.numel() / std::max<int64_t>(1, weight.size(0));
    const auto* from = reinterpret_cast<const uint16_t*>(weight.const_data_ptr<at::BFloat16>());
    if (!in_index && whole % 2 == 0 && row % 2 == 0) {
      data = reinterpret_cast<const float*>(from);
      ldw = row / 2;
      return;
    }
    gathered = true;
    const int64_t rows = out_index ? out_index->size(1) : weight.size(0), words = (whole + 31) / 32;
    ldw = depth;
    sample = rows * ldw;
    float* to = scratch_memory<Use::weights>(samples * sample);
    data = to;
    std::vector<uint32_t> masks(samples * words);
    for (int64_t s = 0; s < samples; s++) {
      const int64_t* active = row_of<int64_t>(in_index, s);
      for (int64_t j = 0; j < channels; j++) {
        TORCH_CHECK(!active || j == 0 || active[j - 1] < active[j], "with bfloat16 weights in_index must be ascending");
        for (int64_t t = 0; t < each; t++) {
          const int64_t bit = (active ? active[j] : j) * each + t;
          masks[s * words + bit / 32] |= 1u << bit % 32;
        }
      }
    }
    const auto compress = pair_kernels()->compress;
    at::parallel_for(0, samples * rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, whole)),
                     [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t s = i / rows, r = i % rows, o = out_index ? row_of<int64_t>(out_index, s)[r] : r;
        auto* values = reinterpret_cast<uint16_t*>(to + i * ldw);
        if (ldw) values[2 * ldw - 1] = 0;
        compress(from + o * row, masks.data() + s * words, words, values);
      }
    });
  }
  Weights(const Weights&) = delete;
  const int32_t* columns_of(int64_t s) const { return columns.data() + (pairs ? 0 : s * depth); }
};

// How one sample's layer is cut into tasks: by pixels, since rows share the packing of pixels, as long as each task gets a
// whole panel; then by rows. Of few vectors each takes as long as a panel does: what is shared is the weights.
struct Cut {
  int64_t chunks, row_cuts;
};
Cut cut(int64_t items, int64_t vectors, int64_t rows, double flops) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || flops < 2e5 || at::in_parallel_region()) return {1, 1};
  const int64_t wanted = items >= 4 * threads ? 1 : (threads + items - 1) / items;
  const int64_t chunks = std::max<int64_t>(1, std::min(wanted, vectors / 4));
  const int64_t row_cuts = std::max<int64_t>(1, std::min((wanted + chunks - 1) / chunks, rows / 12));
  return {chunks, row_cuts};
}

// The i-th of n parts.
Range part(const Range& r, int64_t i, int64_t n) {
  const int64_t bytes = r.end - r.begin;
  return {r.begin + bytes * i / n, r.begin + bytes * (i + 1) / n};
}

template <typename F>
void for_all(int64_t tasks, double flops, const F& run) {
  at::parallel_for(0, tasks, flops < 2e5 ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) run(i);
  });
}

// How the planes of x are padded for a kernel, and where its taps then lie.
struct Padded {
  Padding how;
  std::vector<Phase> phase;
  std::vector<int64_t> tap_offset;
  int64_t plane = 0, row_pitch = 0;
  static constexpr int64_t slack = 64;  // what vectors may read beyond the last plane

  Padded(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
         at::IntArrayRef dilation, int64_t height, int64_t width, float fill = 0.f) {
    const int64_t W = x.size(3), sh = stride[0], sw = stride[1];
    const int64_t reach = (kernel[1] - 1) * dilation[1] + 1, phases = std::min(sw, reach);
    const int64_t columns = ((width - 1) * sw + reach + sw - 1) / sw, pitch = phases * columns;
    const bool all_rows = kernel[0] > 1;
    const int64_t rows = all_rows ? (height - 1) * sh + (kernel[0] - 1) * dilation[0] + 1 : height;
    plane = rows * pitch;
    row_pitch = (all_rows ? sh : 1) * pitch;
    for (int64_t i = 0; i < kernel[0]; i++)
      for (int64_t j = 0; j < kernel[1]; j++) {
        const int64_t c = j * dilation[1];
        tap_offset.push_back(i * dilation[0] * pitch + (c % sw) * columns + c / sw);
      }
    for (int64_t f = 0; f < phases; f++) {
      const int64_t shift = f - padding[1];  // column q comes from q * sw + shift
      const int64_t left = std::min(columns, shift >= 0 ? 0 : (-shift + sw - 1) / sw);
      const int64_t until = std::min(columns, shift >= W ? 0 : (W - shift + sw - 1) / sw);
      phase.push_back({left * sw + shift, std::max<int64_t>(0, until - left), left});
    }
    how = {x.size(2), W, rows, all_rows ? 1 : sh, padding[0], phases, columns, sw, phase.data(), fill};
  }
  Padded(const Padded&) = delete;

  Tensor copy(const Tensor& x) const {
    const int64_t planes = x.size(0) * x.size(1), whole = x.size(2) * x.size(3);
    Tensor memory = fresh({planes * plane + slack}, x.options());
    const float* from = x.const_data_ptr<float>();
    float* to = memory.mutable_data_ptr<float>();
    std::fill(to + planes * plane, to + planes * plane + slack, 0.f);
    const auto pad = kernels().pad;
    at::parallel_for(0, planes, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, plane)), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; i++) pad(how, from + i * whole, true, to + i * plane);
    });
    return memory;
  }

  // run(i, plane i padded), for each of `planes` planes of `whole` values: one at a time, so that it stays in the cache.
  template <typename F>
  void each(int64_t planes, double flops, const float* x, int64_t whole, const F& run) const {
    const auto pad = kernels().pad;
    at::parallel_for(0, planes, flops < 2e5 ? planes : 1, [&](int64_t begin, int64_t end) {
      float* padded = scratch_memory(plane + slack);
      for (int64_t i = begin; i < end; i++) {
        pad(how, x + i * whole, i == begin, padded);
        run(i, padded);
      }
    });
  }
};

// Convolution over active sets, then bias, gain, residual and activation → y (B, n_out, H', W') and, if `mean`, the mean
// of |y| over the pixels (B, n_out), which the next gate reads.
// `winograd`: by minimal filtering, winograd.inl or phases.inl.
// `inplace`: the result takes the place of the residual.
std::tuple<Tensor, Tensor> convolve(const Tensor& x_, const Tensor& weight_, const optional<Tensor>& bias_,
                                  const optional<Tensor>& in_index_, const optional<Tensor>& out_index_,
                                  const optional<Tensor>& gain_, const optional<Tensor>& residual_,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups, bool whole_groups, c10::string_view activation, bool mean,
                                  bool winograd, bool inplace) {
  TORCH_CHECK(x_.dim() == 4 && weight_.dim() == 4 && x_.scalar_type() == at::kFloat &&
                  (weight_.scalar_type() == at::kFloat || weight_.scalar_type() == at::kBFloat16),
              "x and weight must be four-dimensional and float32, or the weight bfloat16");
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride, padding and dilation are pairs");
  const Tensor x = x_.contiguous(), weight = readable(with_rows(weight_));
  const auto bias = contiguous(bias_), in_index = contiguous(in_index_), out_index = contiguous(out_index_),
             residual = contiguous(residual_);
  const int64_t out_all = weight.size(0), cg = weight.size(1);
  const std::array<int64_t, 2> kernel_size = {weight.size(2), weight.size(3)};
  check_index(in_index, cg, "in_index");
  check_index(out_index, out_all, "out_index");
  const int64_t B = x.size(0), taps = kernel_size[0] * kernel_size[1];
  const int64_t R_all = out_index ? out_index->size(1) : out_all;
  int64_t G = groups;
  if (whole_groups && groups > 1) {
    TORCH_CHECK(!in_index, "whole groups are named by out_index alone");
    TORCH_CHECK(x.size(1) % cg == 0, "x holds ", x.size(1), " channels, no multiple of a group's ", cg);
    G = x.size(1) / cg;
  }
  const int64_t K = in_index ? in_index->size(1) : cg;
  TORCH_CHECK(G >= 1 && x.size(1) == K * G, "x has ", x.size(1), " channels where ", K * G, " are active");
  TORCH_CHECK(R_all % G == 0, R_all, " active outputs do not divide among ", G, " groups");
  const int64_t R = R_all / G;
  const int64_t rows_of_index = in_index ? in_index->size(0) : out_index ? out_index->size(0) : 1;
  TORCH_CHECK(!in_index || !out_index || in_index->size(0) == out_index->size(0), "indices of different batches");
  TORCH_CHECK(rows_of_index >= 1 && B % rows_of_index == 0, B, " rows of x for ", rows_of_index, " samples");
  const int64_t repeat = B / rows_of_index;
  optional<Tensor> gain;
  if (gain_) gain = gain_->to(at::kFloat).contiguous();
  TORCH_CHECK(!gain || (gain->size(0) == rows_of_index && gain->size(1) == R_all), "gain must be (B, n_out)");
  TORCH_CHECK(!bias || bias->numel() == out_all, "bias must be (C_out,)");

  auto size = [&](int d) {
    return (x.size(d + 2) + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) / stride[d] + 1;
  };
  const int64_t Ho = size(0), Wo = size(1), N = Ho * Wo;
  TORCH_CHECK(Ho > 0 && Wo > 0, "the kernel is larger than the padded input");
  Tensor y = inplace ? *residual : fresh({B, R_all, Ho, Wo}, x.options());
  TORCH_CHECK(y.dim() == 4 && y.size(0) == B && y.size(1) == R_all && y.size(2) == Ho && y.size(3) == Wo &&
                  y.scalar_type() == at::kFloat,
              "residual has another shape or type than the output");
  TORCH_CHECK(!residual || residual->sizes() == y.sizes(), "residual has another shape than the output");
  Tensor total = mean ? at::empty({B, R_all}, x.options()) : at::empty({0}, x.options());
  float* sum_of = mean ? total.mutable_data_ptr<float>() : nullptr;
  if (mean) std::fill(sum_of, sum_of + B * R_all, 0.f);
  if (y.numel() == 0) return {y, total};
  auto finish = [&] {  // sums to means
    if (mean)
      for (int64_t i = 0; i < B * R_all; i++) sum_of[i] /= float(N);
  };

  auto all = [](at::IntArrayRef a, int64_t value) { return a[0] == value && a[1] == value; };
  const bool direct = taps == 1 && all(stride, 1) && all(padding, 0);
  const bool phases = winograd && all(kernel_size, 7) && all(stride, 2);
  TORCH_CHECK(!winograd || ((phases || (all(kernel_size, 3) && all(stride, 1))) && groups == 1 && all(dilation, 1) &&
                            weight_.scalar_type() == at::kFloat),
              "minimal filtering needs a weight (C_out, C_in, 3, 3) and a stride of 1, or (C_out, C_in, 7, 7) and a stride of "
              "2, in float32, and dilation and groups of 1");
  const int64_t height = winograd ? (Ho + 1) / 2 : Ho, width = winograd ? (Wo + 1) / 2 : Wo;  // in tiles or pixels
  const bool one_each = !direct && !winograd && K == 1 && R == 1 && !residual;  // depthwise
  const int64_t side = kernel_size[0];
  const bool whole_plane = one_each && all(kernel_size, side) && (side == 3 || side == 5 || side == 7) &&
                           (all(stride, 1) || all(stride, 2)) && all(dilation, 1) && Ho >= 4;
  optional<Padded> p;
  if (winograd) {
    const int64_t taps_of_tile = phases ? 9 : 4, apart = phases ? 4 : 2;
    p.emplace(x, at::IntArrayRef({taps_of_tile, taps_of_tile}), at::IntArrayRef({apart, apart}), padding,
              at::IntArrayRef({1, 1}), height, width);
  } else if (!direct && !whole_plane) {
    p.emplace(x, kernel_size, stride, padding, dilation, Ho, Wo);
  }
  const Activation act = activation_of(activation);
  const Kernels& kernel = kernels();
  const double flops = 2.0 * B * R_all * K * taps * N;
  float* out = y.mutable_data_ptr<float>();

  if (one_each) {
    const float* from = x.const_data_ptr<float>();
    const int64_t whole = x.size(2) * x.size(3);
    const Tensor single = weight.to(at::kFloat);
    const float* w = single.const_data_ptr<float>();
    const int64_t ldw = single.stride(0);
    // Once, not for each plane: of a small one asking for the pointers takes as long as the arithmetic.
    const float *biases = bias ? bias->const_data_ptr<float>() : nullptr, *gains = row_of<float>(gain, 0);
    const int64_t *rows = row_of<int64_t>(out_index, 0), *columns = row_of<int64_t>(in_index, 0);
    const int64_t* tap_offset = p ? p->tap_offset.data() : nullptr;
    const int64_t pitch = p ? p->row_pitch : 0, H = x.size(2), W = x.size(3);
    auto run = [&](int64_t i, const float* plane) {
      const int64_t r = i % G, s = i / G / repeat, o = rows ? rows[s * R_all + r] : r;
      const Depthwise d{plane, taps, tap_offset, Ho, Wo, pitch, w + o * ldw + (columns ? columns[s] * taps : 0),
                        biases ? biases[o] : 0.f, gains ? gains[s * R_all + r] : 1.f, act, out + i * N,
                        stride[0], padding[0], padding[1], H, W};
      kernel.depthwise(d, sum_of ? sum_of + i : nullptr);
    };
    if (p)
      p->each(B * G, flops, from, whole, run);
    else
      for_all(B * G, flops, [&](int64_t i) { run(i, from + i * whole); });
    finish();
    return {y, total};
  }

  const Tensor padded = p ? p->copy(x) : x;
  const float* source = padded.const_data_ptr<float>();
  const int64_t plane = p ? p->plane : N;
  const int64_t each = winograd ? 1 : taps;  // columns of a channel in the weight's rows
  const Weights w(weight, in_index, out_index, rows_of_index, K, each);

  // What is cut among threads: vectors of pixels, or rows of tiles, of which a task needs one at least.
  const int64_t vectors = (height * width + kernel.lanes - 1) / kernel.lanes, steps = winograd ? height : vectors;
  const Cut c = cut(B * G, std::min(vectors, 4 * steps), R, flops);
  Tensor partial;
  if (mean && c.chunks > 1) partial = at::zeros({c.chunks, B, R_all}, x.options());
  const int64_t need = phases     ? kernel.phases_scratch(K, R)
                       : winograd ? kernel.winograd_scratch(K, R, height * width)
                                  : kernel.scratch(K * taps, w.row_length, R, 4 * R * w.ldw);
  const Range later = ahead();
  for_all(B * G * c.chunks * c.row_cuts, flops, [&](int64_t i) {
    const int64_t row_cut = i % c.row_cuts, chunk = i / c.row_cuts % c.chunks, item = i / c.row_cuts / c.chunks;
    const int64_t b = item / G, g = item % G, s = b / repeat;
    Layer l{};
    l.source = taps == 1 ? Source::contiguous : Source::padded;  // of 1×1 a padded copy is as large as the output
    l.x = source + (b * G + g) * K * plane;
    l.plane = plane;
    l.taps = taps;
    l.tap_offset = p ? p->tap_offset.data() : nullptr;
    l.width = width;
    l.row_pitch = p ? p->row_pitch : 0;
    l.pixels = height * width;
    l.channels = K;
    l.rows = R;
    l.weight = w.data + s * w.sample;
    l.ldw = w.ldw;
    l.gathered = w.gathered ? g * R : -1;
    l.out = out_index ? row_of<int64_t>(out_index, s) + g * R : nullptr;
    l.first_row = g * R;
    l.columns = w.columns_of(s);
    l.row_length = w.row_length;
    l.bias = bias ? bias->const_data_ptr<float>() : nullptr;
    l.gain = gain ? row_of<float>(gain, s) + g * R : nullptr;
    const int64_t at = (b * R_all + g * R) * N;
    l.residual = residual ? residual->const_data_ptr<float>() + at : nullptr;
    l.activation = act;
    l.y = out + at;
    l.tokens_out = false;
    l.ldy = N;
    l.ahead = part(later, i, B * G * c.chunks * c.row_cuts);
    float* to = !mean ? nullptr : c.chunks > 1 ? partial.mutable_data_ptr<float>() + chunk * B * R_all : sum_of;
    const int64_t begin = steps * chunk / c.chunks, end = steps * (chunk + 1) / c.chunks;
    const int64_t r0 = R * row_cut / c.row_cuts, r1 = R * (row_cut + 1) / c.row_cuts;
    float* sums = to ? to + b * R_all + g * R : nullptr;
    if (winograd)
      (phases ? kernel.phases : kernel.winograd)({l, Ho, Wo}, begin, end, r0, r1, scratch_memory(need), sums);
    else
      (w.pairs ? pair_kernels()->layer : kernel.layer)(l, begin, end, r0, r1, scratch_memory(need), sums);
  });
  if (partial.defined()) at::sum_out(total, partial, {0});
  finish();
  return {y, total};
}

std::tuple<Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                                  const optional<Tensor>& in_index, const optional<Tensor>& out_index,
                                  const optional<Tensor>& gain, const optional<Tensor>& residual,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  int64_t groups, bool whole_groups, c10::string_view activation, bool mean,
                                  bool winograd) {
  return convolve(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups, whole_groups,
                  activation, mean, winograd, false);
}

// The same, its result in the place of the residual; returns the mean.
Tensor conv2d_into(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                   const optional<Tensor>& in_index, const optional<Tensor>& out_index, const optional<Tensor>& gain,
                   const Tensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   int64_t groups, bool whole_groups, c10::string_view activation, bool mean,
                   bool winograd) {
  auto [y, s] = convolve(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups,
                         whole_groups, activation, mean, winograd, true);
  if (!y.is_same(residual)) residual.copy_(y);
  return s;
}

// Max pooling, (B, C, H, W) → (B, C, H', W'): PyTorch's own is not vectorised over pixels.
Tensor max_pool2d(const Tensor& x_, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                  bool ceil_mode) {
  TORCH_CHECK(x_.dim() == 4 && x_.scalar_type() == at::kFloat, "x must be (B, C, H, W), float32");
  const Tensor x = x_.contiguous();
  auto size = [&](int d) {
    const int64_t room = x.size(d + 2) + 2 * padding[d] - kernel[d];
    int64_t n = (room + (ceil_mode ? stride[d] - 1 : 0)) / stride[d] + 1;
    if (ceil_mode && (n - 1) * stride[d] >= x.size(d + 2) + padding[d]) n--;
    return room < 0 ? 0 : n;
  };
  const int64_t Ho = size(0), Wo = size(1);
  TORCH_CHECK(Ho > 0 && Wo > 0, "the window is larger than the padded input");
  Tensor y = fresh({x.size(0), x.size(1), Ho, Wo}, x.options());
  if (y.numel() == 0) return y;
  const Padded p(x, kernel, stride, padding, at::IntArrayRef({1, 1}), Ho, Wo, -std::numeric_limits<float>::infinity());
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const Kernels& kernels_ = kernels();
  const int64_t whole = x.size(2) * x.size(3);
  const int64_t taps = kernel[0] * kernel[1];
  p.each(x.size(0) * x.size(1), double(y.numel()) * taps, from, whole, [&](int64_t i, const float* padded) {
    kernels_.depthwise({padded, taps, p.tap_offset.data(), Ho, Wo, p.row_pitch, nullptr, 0.f, 1.f, Activation::none,
                        to + i * Ho * Wo},
                       nullptr);
  });
  return y;
}

// Where outputs of a bilinear interpolation lie between inputs, computed as PyTorch does.
struct Between {
  std::vector<int32_t> first, second;
  std::vector<float> near, far;
  Between(int64_t from, int64_t to, bool align_corners, optional<double> factor)
      : first(to), second(to), near(to), far(to) {
    // The same size is a copy, whatever the factor.
    const float step = from == to              ? 1.f
                       : align_corners         ? (to > 1 ? float(from - 1) / float(to - 1) : 0.f)
                       : factor && *factor > 0 ? float(1.0 / *factor)
                                               : float(from) / float(to);
    for (int64_t i = 0; i < to; i++) {
      const float at = align_corners || from == to ? step * float(i) : std::max(0.f, step * (float(i) + 0.5f) - 0.5f);
      const int64_t below = std::min<int64_t>(int64_t(at), from - 1);
      first[i] = int32_t(below);
      second[i] = int32_t(std::min(below + 1, from - 1));
      far[i] = std::min(std::max(at - float(below), 0.f), 1.f);
      near[i] = 1.f - far[i];
    }
  }
  Axis axis() const { return {int64_t(first.size()), first.data(), second.data(), near.data(), far.data()}; }
};

// Bilinear interpolation, (B, C, H, W) → (B, C, H', W'): PyTorch's own computes pixel by pixel. `factors`: what the size
// was multiplied by, if that is to decide where pixels lie.
Tensor upsample_bilinear2d(const Tensor& x_, at::IntArrayRef size, bool align_corners,
                           const optional<at::ArrayRef<double>>& factors) {
  TORCH_CHECK(x_.dim() == 4 && x_.scalar_type() == at::kFloat, "x must be (B, C, H, W), float32");
  TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && x_.size(2) > 0 && x_.size(3) > 0,
              "input and output must have pixels");
  TORCH_CHECK(!factors || factors->size() == 2, "factors are a pair");
  const Tensor x = x_.contiguous();
  const int64_t planes = x.size(0) * x.size(1), H = x.size(2), W = x.size(3), lanes = kernels().lanes;
  Tensor y = fresh({x.size(0), x.size(1), size[0], size[1]}, x.options());
  const Between rows(H, size[0], align_corners, factors ? optional<double>((*factors)[0]) : std::nullopt);
  const Between columns(W, size[1], align_corners, factors ? optional<double>((*factors)[1]) : std::nullopt);
  const Resize how{W, rows.axis(), columns.axis()};
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const auto run = kernels().resize;
  const int64_t pixels = size[0] * size[1], line = (size[1] + lanes - 1) / lanes * lanes;
  at::parallel_for(0, planes, std::max<int64_t>(1, 32768 / pixels), [&](int64_t begin, int64_t end) {
    float* lines = scratch_memory(2 * line);
    for (int64_t i = begin; i < end; i++) run(how, from + i * H * W, to + i * pixels, lines);
  });
  return y;
}

// Linear layer over active sets, then bias, gain, residual and activation: x (B, …, n_in) → (B, …, n_out).
// `x_columns`: x is (B, n_in, …); `y_columns`: the result is (B, n_out, …). Between two layers this spares turning it.
Tensor linear(const Tensor& x_, const Tensor& weight_, const optional<Tensor>& bias_, const optional<Tensor>& in_index_,
              const optional<Tensor>& out_index_, const optional<Tensor>& gain_, const optional<Tensor>& residual_,
              c10::string_view activation, bool x_columns, bool y_columns) {
  TORCH_CHECK(x_.dim() >= 1 && weight_.dim() == 2 && x_.scalar_type() == at::kFloat &&
                  (weight_.scalar_type() == at::kFloat || weight_.scalar_type() == at::kBFloat16),
              "x must be (…, n_in), float32, and weight (C_out, C_in), float32 or bfloat16");
  TORCH_CHECK(x_.dim() >= 2 || !(x_columns || y_columns), "columns need a batch");
  const Tensor x = x_.contiguous(), weight = readable(with_rows(weight_));
  const auto bias = contiguous(bias_), in_index = contiguous(in_index_), out_index = contiguous(out_index_),
             residual = contiguous(residual_);
  check_index(in_index, weight.size(1), "in_index");
  check_index(out_index, weight.size(0), "out_index");
  const int64_t K = x.size(x_columns ? 1 : -1), R = out_index ? out_index->size(1) : weight.size(0);
  const int64_t active = in_index ? in_index->size(1) : weight.size(1);
  TORCH_CHECK(K == active, "x has ", K, " channels where ", active, " are active");
  const int64_t B = in_index ? in_index->size(0) : out_index ? out_index->size(0) : 1;
  TORCH_CHECK(!in_index || !out_index || in_index->size(0) == out_index->size(0), "indices of different batches");
  TORCH_CHECK(!bias || bias->numel() == weight.size(0), "bias must be (C_out,)");
  optional<Tensor> gain;
  if (gain_) gain = gain_->to(at::kFloat).contiguous();
  TORCH_CHECK(!gain || (gain->size(0) == B && gain->size(1) == R), "gain must be (B, n_out)");
  auto shape = x.sizes().vec();
  shape.erase(x_columns ? shape.begin() + 1 : shape.end() - 1);
  shape.insert(y_columns ? shape.begin() + 1 : shape.end(), R);
  Tensor y = fresh(shape, x.options());
  TORCH_CHECK(!residual || (residual->sizes() == y.sizes() && !y_columns), "residual has another shape than the output");
  if (y.numel() == 0) return y;
  TORCH_CHECK(K > 0 && x.numel() / K % B == 0, "the rows of x do not divide among ", B, " samples");
  const int64_t items = x_columns || y_columns ? x.size(0) : B, repeat = items / B;
  TORCH_CHECK(items % B == 0, items, " rows of x for ", B, " samples");
  const int64_t T = x.numel() / K / items;

  const Weights w(weight, in_index, out_index, B, K, 1);
  const Kernels& kernel = kernels();
  const Activation act = activation_of(activation);
  const double flops = 2.0 * items * T * K * R;
  const int64_t vectors = (T + kernel.lanes - 1) / kernel.lanes, need = kernel.scratch(K, w.row_length, R, 4 * R * w.ldw);
  const Cut c = cut(items, vectors, R, flops);
  const float* from = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const Range later = ahead();
  for_all(items * c.chunks * c.row_cuts, flops, [&](int64_t i) {
    const int64_t row_cut = i % c.row_cuts, chunk = i / c.row_cuts % c.chunks, item = i / c.row_cuts / c.chunks;
    const int64_t s = item / repeat;
    Layer l{};
    l.source = x_columns ? Source::contiguous : Source::tokens;
    l.x = from + item * T * K;
    l.plane = x_columns ? T : K;
    l.taps = 1;
    l.width = l.pixels = T;
    l.channels = K;
    l.rows = R;
    l.weight = w.data + s * w.sample;
    l.ldw = w.ldw;
    l.gathered = w.gathered ? 0 : -1;
    l.out = row_of<int64_t>(out_index, s);
    l.columns = w.columns_of(s);
    l.row_length = w.row_length;
    l.bias = bias ? bias->const_data_ptr<float>() : nullptr;
    l.gain = row_of<float>(gain, s);
    l.residual = residual ? residual->const_data_ptr<float>() + item * T * R : nullptr;
    l.activation = act;
    l.y = out + item * T * R;
    l.tokens_out = !y_columns;
    l.ahead = part(later, i, items * c.chunks * c.row_cuts);
    l.ldy = y_columns ? T : R;
    (w.pairs ? pair_kernels()->layer : kernel.layer)(
        l, vectors * chunk / c.chunks, vectors * (chunk + 1) / c.chunks, R * row_cut / c.row_cuts,
        R * (row_cut + 1) / c.row_cuts, scratch_memory(need), nullptr);
  });
  return y;
}

// Mean of |x|, or of x, over everything but batch and channels, which are the second or the last dimension → (B, C).
Tensor subsample(const Tensor& x_, int64_t channel_dim, bool is_signed) {
  TORCH_CHECK(x_.dim() >= 2 && x_.scalar_type() == at::kFloat, "x must be (B, C, …) or (B, …, C), float32");
  TORCH_CHECK(channel_dim == 1 || channel_dim == x_.dim() - 1, "channels must be the second or the last dimension");
  const Tensor x = x_.contiguous();
  const int64_t B = x.size(0), C = x.size(channel_dim), n = B * C ? x.numel() / B / C : 0;
  const float* from = x.const_data_ptr<float>();
  const Kernels& kernel = kernels();
  if (channel_dim != 1 || x.dim() == 2) {
    // A few hundred tokens at a time, so that rounding does not grow with their number.
    const int64_t step = 256, chunks = std::max<int64_t>(1, (n + step - 1) / step);
    Tensor s = at::empty({B, C}, x.options());
    Tensor partial = chunks == 1 ? s : at::empty({B, chunks, C}, x.options());
    float *mean = s.mutable_data_ptr<float>(), *to = partial.mutable_data_ptr<float>();
    at::parallel_for(0, B * chunks, std::max<int64_t>(1, 256 / std::max<int64_t>(1, C)), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; i++) {
        const int64_t t = i % chunks * step;
        kernel.sum_tokens(from + (i / chunks * n + t) * C, std::min(step, n - t), C, is_signed, to + i * C);
      }
    });
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = 0; c < C; c++) {
        float sum = 0;
        for (int64_t t = 0; t < chunks; t++) sum += to[(b * chunks + t) * C + c];
        mean[b * C + c] = sum / float(n);
      }
    return s;
  }
  Tensor s = at::empty({B, C}, x.options());
  float* to = s.mutable_data_ptr<float>();
  at::parallel_for(0, B * C, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, n)), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      double sum = 0;
      for (int64_t j = 0; j < n; j += 4096)
        sum += kernel.sum(from + i * n + j, std::min<int64_t>(4096, n - j), is_signed);
      to[i] = float(sum / n);
    }
  });
  return s;
}

// Batch norm in eval mode of the active channels, and the activation: x (B, n, …) → the same and, if `mean`, the mean of
// |y| over the pixels, (B, n). index (B, n) or null.
std::tuple<Tensor, Tensor> affine(const Tensor& x_, const Tensor& scale_, const Tensor& shift_,
                                  const optional<Tensor>& index_, c10::string_view activation, bool mean) {
  TORCH_CHECK(x_.dim() >= 2 && x_.scalar_type() == at::kFloat && scale_.scalar_type() == at::kFloat &&
                  shift_.scalar_type() == at::kFloat,
              "x must be (B, n, …), float32");
  const Tensor x = x_.contiguous(), scale = scale_.contiguous(), shift = shift_.contiguous();
  const auto index = contiguous(index_);
  const int64_t B = x.size(0), C = x.size(1), n = B * C ? x.numel() / B / C : 0;
  check_index(index, scale.numel(), "index");
  TORCH_CHECK(index ? index->size(1) == C && index->size(0) > 0 && B % index->size(0) == 0 : scale.numel() == C,
              "x has ", C, " channels where others are active");
  TORCH_CHECK(shift.numel() == scale.numel(), "scale and shift differ in length");
  Tensor y = fresh(x.sizes(), x.options()), s = at::empty({mean ? B : 0, C}, x.options());
  if (y.numel() == 0) return {y, mean ? s.zero_() : s};
  const int64_t repeat = index ? B / index->size(0) : 1;
  const Activation act = activation_of(activation);
  const Kernels& kernel = kernels();
  const float *from = x.const_data_ptr<float>(), *a = scale.const_data_ptr<float>(), *b = shift.const_data_ptr<float>();
  float *to = y.mutable_data_ptr<float>(), *means = mean ? s.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, B * C, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = index ? row_of<int64_t>(index, i / C / repeat)[i % C] : i % C;
      const float sum = kernel.affine(from + i * n, n, a[c], b[c], act, to + i * n);
      if (means) means[i] = sum / float(n);
    }
  });
  return {y, s};
}

// From active sets of sites to the active channels of one tensor, ascending: tables[i] (C_i, m_i) holds the channels of
// each unit of site i; `fixed` channels are always there.
Tensor channel_index(at::TensorList tables, const Tensor& fixed, at::TensorList active, int64_t channels) {
  TORCH_CHECK(!active.empty() && active.size() == tables.size(), "one table for each active set");
  const int64_t B = active[0].size(0);
  int64_t n = fixed.numel();
  for (size_t i = 0; i < active.size(); i++) n += active[i].size(1) * tables[i].size(1);
  Tensor out = at::empty({B, n}, fixed.options());
  int64_t* to = out.mutable_data_ptr<int64_t>();
  std::vector<char> there(channels);
  const Tensor always = fixed.contiguous();
  auto mark = [&](int64_t c) {
    TORCH_CHECK_INDEX(c >= 0 && c < channels, "channel ", c, " is outside [0, ", channels, ")");
    there[c] = 1;
  };
  for (int64_t b = 0; b < B; b++) {
    std::fill(there.begin(), there.end(), 0);
    for (int64_t i = 0; i < always.numel(); i++) mark(always.const_data_ptr<int64_t>()[i]);
    for (size_t i = 0; i < active.size(); i++) {
      const Tensor table = tables[i].contiguous(), units = active[i].contiguous();
      const int64_t m = table.size(1), k = units.size(1);
      for (int64_t j = 0; j < k; j++) {
        const int64_t u = units.const_data_ptr<int64_t>()[b * k + j];
        TORCH_CHECK_INDEX(u >= 0 && u < table.size(0), "unit ", u, " is outside [0, ", table.size(0), ")");
        for (int64_t c = 0; c < m; c++) mark(table.const_data_ptr<int64_t>()[u * m + c]);
      }
    }
    int64_t count = 0;
    for (int64_t c = 0; c < channels; c++)
      if (there[c]) {
        TORCH_CHECK(count < n, "channels are named twice");
        to[b * n + count++] = c;
      }
    TORCH_CHECK(count == n, "channels are named twice");
  }
  return out;
}

// What each channel of a tensor is multiplied by, (B, n): the product over sites of the gain of the unit that it belongs
// to, units[i] (channels,) with -1 for none, gain 1. Channels of suppressed units get 0. index (B, n): of these channels.
Tensor channel_gain(at::TensorList units, at::TensorList active, at::TensorList gain, at::IntArrayRef sizes,
                    const optional<Tensor>& index_) {
  TORCH_CHECK(!units.empty() && active.size() == units.size() && gain.size() == units.size() && sizes.size() == units.size(),
              "one list entry for each site");
  const int64_t B = gain[0].size(0), channels = units[0].numel();
  const auto index = contiguous(index_);
  check_index(index, channels, "index");
  const int64_t n = index ? index->size(1) : channels;
  Tensor out = at::empty({B, n}, gain[0].options());
  TORCH_CHECK(out.scalar_type() == at::kFloat, "gains must be float32");
  std::vector<float> full;
  for (size_t i = 0; i < units.size(); i++) {
    const Tensor of = units[i].contiguous(), winners = active[i].contiguous(), values = gain[i].contiguous();
    const int64_t k = winners.size(1), size = sizes[i];
    TORCH_CHECK(of.numel() == channels && winners.size(0) == B && values.sizes() == winners.sizes(), "shapes differ");
    const int64_t* unit = of.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; b++) {
      full.assign(size + 1, 0.f);  // one more for what fills up sets of their own lengths
      for (int64_t j = 0; j < k; j++) {
        const int64_t u = winners.const_data_ptr<int64_t>()[b * k + j];
        TORCH_CHECK_INDEX(u >= 0 && u <= size, "unit ", u, " is outside [0, ", size, ")");
        full[u] = values.const_data_ptr<float>()[b * k + j];
      }
      float* to = out.mutable_data_ptr<float>() + b * n;
      const int64_t* at = row_of<int64_t>(index, b);
      for (int64_t j = 0; j < n; j++) {
        const int64_t u = unit[at ? at[j] : j];
        TORCH_CHECK_INDEX(u < size, "unit ", u, " is outside [0, ", size, ")");
        const float value = u < 0 ? 1.f : full[u];
        to[j] = i ? to[j] * value : value;
      }
    }
  }
  return out;
}

// φ's saliencies before the rectifier, g (B, C), of s (B, C_in), or (B, n) of the channels that index names.
Tensor saliency(const Tensor& s_, const Tensor& weight_, const Tensor& bias_, const optional<Tensor>& index_,
                const optional<Tensor>& reduce_) {
  const Tensor s = s_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous();
  const auto index = contiguous(index_), reduce = contiguous(reduce_);
  const int64_t B = s.size(0), C = weight.size(0), in = (reduce ? *reduce : weight).size(1);
  TORCH_CHECK(s.dim() == 2 && weight.dim() == 2 && bias.numel() == C && (!reduce || reduce->size(0) == weight.size(1)),
              "s must be (B, n), weight (C, C_in) or (C, rank) with reduce (rank, C_in), bias (C,)");
  TORCH_CHECK(index ? index->sizes() == s.sizes() : s.size(1) == in, "s has ", s.size(1), " channels where ", in, " are");
  for (const Tensor& t : {s, weight, bias, reduce ? *reduce : weight})
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.device().is_cpu(), "the gate must be float32, on the CPU");
  check_index(index, in, "index");
  if (B != 1) {
    Tensor full = index ? at::zeros({B, in}, s.options()).scatter_(1, *index, s) : s;
    if (reduce) full = at::linear(full, *reduce);
    return at::linear(full, weight, bias).contiguous();
  }
  // One sample is a product of a matrix and a vector, from the memory's point of view little work: no operator in between.
  thread_local std::vector<float> full, low;
  const float* x = s.const_data_ptr<float>();
  if (index) {
    full.assign(in, 0.f);
    const int64_t* at = index->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < index->size(1); i++) full[at[i]] = x[i];
    x = full.data();
  }
  const Kernels& kernel = kernels();
  if (reduce) {
    low.resize(reduce->size(0));
    kernel.matvec(reduce->const_data_ptr<float>(), reduce->size(0), in, x, nullptr, low.data());
    x = low.data();
  }
  Tensor g = at::empty({1, C}, s.options());
  float* to = g.mutable_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  const int64_t n = weight.size(1);
  at::parallel_for(0, C, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
    kernel.matvec(w + begin * n, end - begin, n, x, b + begin, to + begin);
  });
  return g;
}

// Saliency and winner-takes-all: s (B, C_in or n) → active set (B, k), ascending, and gain (B, k). With channel_dim
// what the gate looks at, (B, …), in the place of s.
std::tuple<Tensor, Tensor> gate(const Tensor& s, const Tensor& weight, const Tensor& bias, const Tensor& start,
                                const Tensor& strength, const optional<Tensor>& index, int64_t k, bool boost,
                                optional<double> max_gain, optional<int64_t> channel_dim,
                                const optional<Tensor>& reduce) {
  const c10::impl::ExcludeDispatchKeyGuard exact(c10::autocast_dispatch_keyset);  // float32 decides who wins
  const Tensor g = saliency(channel_dim ? subsample(s, *channel_dim, false) : s, weight, bias, index, reduce);
  const Tensor from = start.contiguous();
  const int64_t B = g.size(0), C = g.size(1);
  TORCH_CHECK(from.scalar_type() == at::kFloat && strength.scalar_type() == at::kFloat, "the gate must be float32");
  TORCH_CHECK(k >= 1 && k <= C, "k must be in [1, ", C, "]");
  Tensor active = at::empty({B, k}, g.options().dtype(at::kLong)), gain = at::empty({B, k}, g.options());
  thread_local std::vector<uint64_t> keys;
  thread_local std::vector<char> wins;
  keys.resize(C), wins.resize(C);
  const float* at_start = from.const_data_ptr<float>();
  const float sigma = std::max(*strength.const_data_ptr<float>(), 0.0f);
  const float most = max_gain ? float(*max_gain) : std::numeric_limits<float>::infinity();
  for (int64_t b = 0; b < B; b++) {
    float* v = g.mutable_data_ptr<float>() + b * C;
    for (int64_t i = 0; i < C; i++) v[i] = v[i] < 0 ? 0.f : v[i];  // NaN stays NaN
    int64_t* to = active.mutable_data_ptr<int64_t>() + b * k;
    if (k == C) {
      std::iota(to, to + k, 0);
    } else {
      // Largest first, ties to the lower index; NaN counts as largest, as in torch.sort. g is not negative, and so is
      // ordered as its bits are.
      for (int64_t i = 0; i < C; i++) {
        uint32_t bits;
        const float value = v[i] != v[i] ? std::numeric_limits<float>::quiet_NaN() : v[i] + 0.f;
        std::memcpy(&bits, &value, 4);
        keys[i] = uint64_t(~bits) << 32 | uint64_t(i);
      }
      std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
      std::fill(wins.begin(), wins.end(), 0);
      for (int64_t i = 0; i < k; i++) wins[keys[i] & 0xffffffffu] = 1;
      for (int64_t i = 0, j = 0; i < C; i++)
        if (wins[i]) to[j++] = i;
    }
    float* f = gain.mutable_data_ptr<float>() + b * k;
    for (int64_t j = 0; j < k; j++) {
      const float one = 1 + sigma * (v[to[j]] - at_start[to[j]]);
      f[j] = !boost ? 1.f : one < 0 ? 0.f : one > most ? most : one;
    }
  }
  return {active, gain};
}

}  // namespace
}  // namespace gatedprune

TORCH_LIBRARY(gatedprune, m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, Tensor? gain, "
      "Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, int groups, bool whole_groups, "
      "str activation, bool mean, bool winograd=False) -> (Tensor, Tensor)");
  m.def(
      "conv2d_into(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, Tensor? gain, "
      "Tensor(a!) residual, int[2] stride, int[2] padding, int[2] dilation, int groups, bool whole_groups, "
      "str activation, bool mean, bool winograd=False) -> Tensor");
  m.def("max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode) -> Tensor");
  m.def("upsample_bilinear2d(Tensor x, int[2] size, bool align_corners, float[]? factors) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, Tensor? gain, "
      "Tensor? residual, str activation, bool x_columns=False, bool y_columns=False) -> Tensor");
  m.def("subsample(Tensor x, int channel_dim, bool signed=False) -> Tensor");
  m.def("gate(Tensor s, Tensor weight, Tensor bias, Tensor start, Tensor strength, Tensor? index, int k, bool boost, float? max_gain=None, int? channel_dim=None, Tensor? reduce=None) -> (Tensor, Tensor)");
  m.def("affine(Tensor x, Tensor scale, Tensor shift, Tensor? index, str activation, bool mean) -> (Tensor, Tensor)");
  m.def("channel_index(Tensor[] tables, Tensor fixed, Tensor[] active, int channels) -> Tensor");
  m.def("channel_gain(Tensor[] units, Tensor[] active, Tensor[] gain, int[] sizes, Tensor? index) -> Tensor");
  m.def("multiplies_bfloat16() -> bool", &gatedprune::multiplies_bfloat16);
  m.def("instruction_set(str name) -> str", &gatedprune::instruction_set);
}

TORCH_LIBRARY_IMPL(gatedprune, CPU, m) {
  m.impl("conv2d", &gatedprune::conv2d);
  m.impl("conv2d_into", &gatedprune::conv2d_into);
  m.impl("max_pool2d", &gatedprune::max_pool2d);
  m.impl("upsample_bilinear2d", &gatedprune::upsample_bilinear2d);
  m.impl("linear", &gatedprune::linear);
  m.impl("affine", &gatedprune::affine);
  m.impl("channel_index", &gatedprune::channel_index);
  m.impl("channel_gain", &gatedprune::channel_gain);
  m.impl("subsample", &gatedprune::subsample);
  m.impl("gate", &gatedprune::gate);
}
