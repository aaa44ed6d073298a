// What a kernel needs to know of one convolution or linear layer over active sets, of one sample and one group.
#pragma once
#include <cstdint>

namespace gatedprune {

enum class Activation : int32_t { none = 0, relu = 1, relu6 = 2, hardswish = 3, silu = 4, gelu = 5 };

// Where the pixels (or tokens) of the input lie.
enum class Source : int32_t {
  contiguous,  // channel j: x + j * plane, pixels one after the other
  padded,      // the same of a padded copy: pixel (h, w) of tap t at tap_offset[t] + h * row_pitch + w
  tokens,      // token n: x + n * plane, its channels one after the other
};

// Memory that later operators will read: from the main memory that takes long, so that a layer fetches some of it.
struct Range {
  const char *begin = nullptr, *end = nullptr;
};

struct Layer {
  Source source;
  const float* x;
  int64_t plane;
  int64_t taps;
  const int64_t* tap_offset;  // (taps,)
  int64_t width;              // of the output map
  int64_t row_pitch;
  int64_t pixels;    // N of the output
  int64_t channels;  // K, active input channels
  int64_t rows;      // R, active output channels

  const float* weight;     // full: row o at weight + o * ldw
  int64_t ldw;
  const int64_t* out;      // (R,) rows of the weight, or null: row r is first_row + r
  int64_t first_row;
  int64_t gathered;        // row r is the row gathered + r of `weight`, and only the bias knows `out`; or -1
  const int32_t* columns;  // (K * taps,) offsets inside a row
  int64_t row_length;      // what `columns` choose from

  const float* bias;      // full, or null
  const float* gain;      // (R,) or null
  const float* residual;  // like y, or null
  Activation activation;
  float* y;
  bool tokens_out;
  int64_t ldy;  // row r at y + r * ldy; if tokens_out, token n at y + n * ldy
  Range ahead;
};

// One channel of a depthwise convolution or, without weights, of a max pooling: x is a padded copy. Or, without
// `tap_offset`, the plane itself, where the dilation is 1, the stride 1 or 2, taps are 9, 25 or 49 in a square and the height
// of the output is 4 at least.
struct Depthwise {
  const float* x;
  int64_t taps;
  const int64_t* tap_offset;
  int64_t height, width, row_pitch;  // of the output; between its rows in x
  const float* weight;  // (taps,), or null: the maximum over taps
  float bias, gain;
  Activation activation;
  float* y;
  int64_t stride = 0, top = 0, left = 0, in_height = 0, in_width = 0;  // of the plane itself: its padding, and its size
};

// How a channel's plane, (height, width), is copied with its padding, so that a kernel needs no edges: `rows`, every
// `step`th from `top` above the plane on, each of `phases` × `columns`. Columns are sorted by their remainder modulo the
// stride, so that a tap's columns are contiguous.
struct Phase {
  int64_t first, n, left;  // the first column of the plane in it, how many, and how many of the padding before them
};
struct Padding {
  int64_t height, width, rows, step, top, phases, columns, stride;
  const Phase* phase;
  float fill;
};

// A 3×3 convolution of stride 1 by F(2×2, 3×3). `layer` describes its tiles as the pixels of a convolution with 4×4 taps
// and stride 2: source, x, plane, tap_offset, row_pitch, and `width` and `pixels` counted in tiles; channels, rows, the
// weight's rows and what follows the sums as there. `columns` are the (K,) active channels, each of 9 taps.
// Or a 7×7 convolution of stride 2: the same, with 9×9 taps, stride 4, and 49 taps of each channel.
struct Winograd {
  Layer layer;
  int64_t out_height, out_width;
};

// Interpolation along one dimension: output i is near[i] * x[first[i]] + far[i] * x[second[i]].
struct Axis {
  int64_t count;
  const int32_t *first, *second;
  const float *near, *far;
};
struct Resize {
  int64_t width;  // of the input
  Axis rows, columns;
};

// Kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t lanes;
  // Floats of scratch memory, aligned to cache lines, that `layer` needs for sums over `depth` of the columns of so long
  // rows, and so many rows.
  int64_t (*scratch)(int64_t depth, int64_t row_length, int64_t rows, int64_t weight_bytes);
  // Computes vectors [v0, v1) of `lanes` pixels and rows [r0, r1); adds each row's sum of |y| to sums if not null.
  void (*layer)(const Layer&, int64_t v0, int64_t v1, int64_t r0, int64_t r1, float* scratch, float* sums);
  void (*depthwise)(const Depthwise&, float* sum);
  // Of x, or of |x|.
  float (*sum)(const float* x, int64_t n, bool is_signed);
  // y = activation(x * scale + shift); returns the sum of |y|.
  float (*affine)(const float* x, int64_t n, float scale, float shift, Activation, float* y);
  // y = w x + bias: w (rows, n), row by row; bias may be null.
  void (*matvec)(const float* w, int64_t rows, int64_t n, const float* x, const float* bias, float* y);
  void (*sum_tokens)(const float* x, int64_t tokens, int64_t channels, bool is_signed, float* sums);
  // Without `edges` only what comes from x is written: the padding is there from another plane.
  void (*pad)(const Padding&, const float* x, bool edges, float* y);
  int64_t (*winograd_scratch)(int64_t channels, int64_t rows, int64_t tiles);
  // Computes rows [h0, h1) of tiles and rows [r0, r1).
  void (*winograd)(const Winograd&, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* scratch, float* sums);
  // The same for 7×7 and stride 2.
  int64_t (*phases_scratch)(int64_t channels, int64_t rows);
  void (*phases)(const Winograd&, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* scratch, float* sums);
  // `lines`: two rows of the output, of whole vectors and aligned.
  void (*resize)(const Resize&, const float* x, float* y, float* lines);
};

// Of bfloat16 weights: rows as above, but of pairs of neighbours, as if each were a float; `ldw` and `columns` count pairs,
// `channels` and `taps` values. Values of x are rounded to bfloat16; sums and all that follows are float32.
struct PairKernels {
  // With the scratch memory that `layer` of AVX-512 needs.
  void (*layer)(const Layer&, int64_t v0, int64_t v1, int64_t r0, int64_t r1, float* scratch, float* sums);
  // The values of a row whose bits are set in `mask`, 32 a word, side by side.
  void (*compress)(const uint16_t* from, const uint32_t* mask, int64_t words, uint16_t* to);
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();    // null where the compiler does not know it
const Kernels* kernels_avx512();  // null where the compiler does not know it
const PairKernels* kernels_bfloat16();  // null where the compiler or the CPU does not know it

}  // namespace gatedprune
