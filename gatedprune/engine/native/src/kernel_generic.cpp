// The kernels for any machine: vectors of 128 bits (SSE2, NEON).
#define GP_NS generic
#define GP_TARGET
#define GP_LANES 4
#if defined(__aarch64__)  // 32 registers
#define GP_MAX_NV 4
#define GP_TILE_1 12
#define GP_TILE_2 12
#define GP_TILE_3 8
#define GP_TILE_4 6
#else
#define GP_MAX_NV 2
#define GP_TILE_1 8
#define GP_TILE_2 6
#define GP_TILE_3 0
#define GP_TILE_4 0
#endif
#include "kernel.inl"

namespace gatedprune {
const Kernels* kernels_generic() {
  static const Kernels all{"generic", generic::L, &generic::scratch, &generic::layer, &generic::depthwise, &generic::sum,
                           &generic::affine, &generic::matvec, &generic::sum_tokens, &generic::pad,
                           &generic::winograd_scratch, &generic::winograd, &generic::phases_scratch, &generic::phases, &generic::resize};
  return &all;
}
}  // namespace gatedprune
