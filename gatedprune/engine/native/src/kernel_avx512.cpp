// The kernels for avx512.
#if defined(__x86_64__) && defined(__GNUC__)
#define GP_NS avx512
#define GP_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define GP_LANES 16
#define GP_MAX_NV 4
#define GP_TILE_1 12
#define GP_TILE_2 12
#define GP_TILE_3 8
#define GP_TILE_4 6
#include "kernel.inl"

namespace gatedprune {
const Kernels* kernels_avx512() {
  static const Kernels all{"avx512", avx512::L, &avx512::scratch, &avx512::layer, &avx512::depthwise, &avx512::abs_sum,
                           &avx512::affine, &avx512::abs_sum_tokens};
  return &all;
}
}  // namespace gatedprune
#else
#include "layer.h"
const gatedprune::Kernels* gatedprune::kernels_avx512() { return nullptr; }
#endif
