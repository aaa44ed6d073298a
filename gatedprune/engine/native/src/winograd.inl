// Winograd's minimal filtering F(2×2, 3×3) over active sets: 16 products where a 3×3 convolution has 36 (Lavin and Gray
// 2016, arXiv:1509.09308, section 4.1). A tile is 2×2 pixels of the output; each of its 16 positions in the transformed
// domain is a product of matrices of its own, by the tiles of kernel.inl, so that here too no weight is copied.
// Included by kernel.inl.

// What a panel holds at once: a block of channels of all positions stays in the second-level cache.
constexpr int64_t W_BLOCK = 128;
// Positions lie a cache line further apart than their size, a power of two, which would put them in the same sets.
constexpr int64_t APART = 16;

// to[p] = B^T d B at position p, for the channels [k0, k1) of x. g: of the tiles in a panel, as for 16 taps.
template <int NV>
GP_INLINE void transform_in(const Layer& l, const Gather& g, int64_t k0, int64_t k1, float* to, int64_t position) {
  for (int64_t k = k0; k < k1; k++)
    for (int v = 0; v < NV; v++, to += L) {
      const float* from = l.x + k * l.plane;
      const Piece *first = g.piece + g.begin[v], *end = g.piece + g.begin[v + 1];
      V d[16], w[16];
      GP_UNROLL for (int t = 0; t < 16; t++) d[t] = load(from + l.tap_offset[t] + first->offset);
      for (const Piece* p = first + 1; p < end; p++)
        GP_UNROLL for (int t = 0; t < 16; t++) d[t] = load_over(d[t], from + l.tap_offset[t] + p->offset, p->lanes);
      GP_UNROLL for (int j = 0; j < 4; j++) {
        w[j] = d[j] - d[8 + j];
        w[4 + j] = d[4 + j] + d[8 + j];
        w[8 + j] = d[8 + j] - d[4 + j];
        w[12 + j] = d[4 + j] - d[12 + j];
      }
      GP_UNROLL for (int i = 0; i < 16; i += 4) {
        *(V*)(to + i * position) = w[i] - w[i + 2];
        *(V*)(to + (i + 1) * position) = w[i + 1] + w[i + 2];
        *(V*)(to + (i + 2) * position) = w[i + 2] - w[i + 1];
        *(V*)(to + (i + 3) * position) = w[i + 1] - w[i + 3];
      }
    }
}

// Where the tiles of a vector go: rows of tiles end inside it. `at` is where its first lane would lie; the pixels of the
// two columns of tiles, interleaved, are two vectors, of which the lanes `low` and `high` are stored.
struct Place {
  int64_t at;
  Span low, high;
  bool below;  // the second row of pixels is inside the map
};
struct Places {
  int count;
  Place place[GP_LANES + 1];
};

GP_INLINE void plan_out(const Winograd& c, int64_t n0, int64_t end, Places& to) {
  to.count = 0;
  const int64_t width = c.layer.width;
  for (int64_t lane = 0, n = n0; lane < L && n < end;) {
    const int64_t h = n / width, w = n % width, len = std::min({L - lane, width - w, end - n});
    const int64_t from = 2 * lane, until = from + std::min(2 * len, c.out_width - 2 * w);
    Place& p = to.place[to.count++];
    p.at = 2 * h * c.out_width + 2 * w - from;
    p.low = span(std::min<int64_t>(from, L), std::min<int64_t>(until, L));
    p.high = span(std::max<int64_t>(from - L, 0), std::max<int64_t>(until - L, 0));
    p.below = 2 * h + 1 < c.out_height;
    lane += len;
    n += len;
  }
}

// Two vectors of even and odd columns to two of neighbours.
GP_INLINE void interleave(V even, V odd, V& low, V& high) {
#if defined(__clang__)
  for (int i = 0; i < L; i++) {
    low[i] = i % 2 ? odd[i / 2] : even[i / 2];
    high[i] = i % 2 ? odd[(L + i) / 2] : even[(L + i) / 2];
  }
#else
  M first, second;
  for (int i = 0; i < L; i++) {
    first[i] = i / 2 + i % 2 * L;
    second[i] = first[i] + L / 2;
  }
  low = __builtin_shuffle(even, odd, first);
  high = __builtin_shuffle(even, odd, second);
#endif
}

// One row of pixels of a vector of tiles: residual, activation, store; returns the sum of |y|.
GP_INLINE V finish_row(const Layer& l, V low, V high, const Places& to, int64_t row, bool second) {
  V total = V{};
  if (l.residual) {
    V a = V{}, b = V{};
    for (int i = 0; i < to.count; i++) {
      const Place& p = to.place[i];
      if (second && !p.below) continue;
      a = load_span(a, l.residual + row + p.at, p.low);
      b = load_span(b, l.residual + row + p.at + L, p.high);
    }
    low += a;
    high += b;
  }
  low = activate(low, l.activation);
  high = activate(high, l.activation);
  for (int i = 0; i < to.count; i++) {
    const Place& p = to.place[i];
    if (second && !p.below) continue;
    store_span(l.y + row + p.at, low, p.low);
    store_span(l.y + row + p.at + L, high, p.high);
    total += vabs(keep_span(low, p.low)) + vabs(keep_span(high, p.high));
  }
  return total;
}

// y = A^T m A of rows [r0, r1), and what follows it. acc: (positions, rows, nv, L).
GP_INLINE void transform_out(const Winograd& c, const float* acc, int64_t position, int64_t r0, int64_t r1, int nv,
                             const Places* places, float* totals) {
  const Layer& l = c.layer;
  for (int64_t r = r0; r < r1; r++) {
    const int64_t row = r * l.ldy;
    const V bias = splat(l.bias ? l.bias[row_number(l, r)] : 0.f), gain = splat(l.gain ? l.gain[r] : 1.f);
    V total = totals ? *(const V*)(totals + (r - r0) * L) : V{};
    for (int v = 0; v < nv; v++, acc += L) {
      V s[8], low, high;
      GP_UNROLL for (int j = 0; j < 4; j++) {
        const V a = *(const V*)(acc + j * position), b = *(const V*)(acc + (4 + j) * position),
                d = *(const V*)(acc + (8 + j) * position), e = *(const V*)(acc + (12 + j) * position);
        s[j] = a + b + d;
        s[4 + j] = b - d - e;
      }
      GP_UNROLL for (int i = 0; i < 2; i++) {
        const V* t = s + 4 * i;
        interleave((t[0] + t[1] + t[2] + bias) * gain, (t[1] - t[2] - t[3] + bias) * gain, low, high);
        total += finish_row(l, low, high, places[v], row + i * c.out_width, i);
      }
    }
    if (totals) *(V*)(totals + (r - r0) * L) = total;
  }
}

// Panels that share each weight, as in kernel.inl; a panel is sixteen times as large here.
constexpr int64_t W_MAX_GROUP = 2;
static int64_t winograd_group(int64_t weight_bytes) { return weight_bytes > (512 << 10) ? W_MAX_GROUP : 1; }

static int64_t winograd_scratch(int64_t rows, int64_t weight_bytes) {
  const int64_t width = GP_MAX_NV * L;
  return winograd_group(weight_bytes) * 16 * (width * (W_BLOCK + rows) + 2 * APART) + rows * L + 64;
}

GP_TARGET static void winograd(const Winograd& c, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* memory,
                               float* sums) {
  static const TileTable tiles;
  const Layer& l = c.layer;
  const int64_t rows = r1 - r0, most = winograd_group(16 * 4 * l.rows * l.ldw);
  float* totals = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  if (sums) std::memset(totals, 0, rows * L * sizeof(float));
  float* packed = totals + rows * L;
  Gather gather[W_MAX_GROUP];
  Places places[W_MAX_GROUP][GP_MAX_NV];
  const int64_t begin = h0 * l.width, end = h1 * l.width;
  for (int64_t left = (end - begin + L - 1) / L, n0 = begin; left > 0;) {
    const Panels all = split(left);
    const int nv = all.nv, tall = TILE_ROWS[nv];
    const int64_t group = std::min(most, all.wide);
    const int64_t width = nv * L, position = width * W_BLOCK + APART, panel = 16 * position;
    const int64_t acc_position = width * rows + APART, acc_panel = 16 * acc_position;
    float* acc = packed + group * panel;
    for (int64_t q = 0; q < group; q++) {
      plan(l, n0 + q * width, nv, gather[q]);
      for (int v = 0; v < nv; v++) plan_out(c, n0 + q * width + v * L, end, places[q][v]);
    }
    for (int64_t k0 = 0; k0 < l.channels; k0 += W_BLOCK) {
      const int64_t k1 = std::min(l.channels, k0 + W_BLOCK);
      for (int64_t q = 0; q < group; q++) {
        float* to = packed + q * panel;
        switch (nv) {
          case 1: transform_in<1>(l, gather[q], k0, k1, to, position); break;
          case 2: transform_in<2>(l, gather[q], k0, k1, to, position); break;
#if GP_MAX_NV > 2
          case 3: transform_in<3>(l, gather[q], k0, k1, to, position); break;
          default: transform_in<4>(l, gather[q], k0, k1, to, position);
#endif
        }
      }
      for (int64_t p = 0; p < 16; p++)
        for (int64_t r = r0; r < r1;) {
          const int height = int(std::min<int64_t>(tall, r1 - r));
          const float *row[16], *ahead[16];
          const bool wrap = r + height >= r1;  // the first rows of the next position
          const int64_t from = wrap ? r0 : r + height;
          const float *here = c.layer.weight + p * c.position, *there = wrap ? here + c.position : here;
          for (int i = 0; i < height; i++) {
            row[i] = here + row_number(l, r + i) * l.ldw;
            ahead[i] = there + row_number(l, std::min(from + i, r1 - 1)) * l.ldw;
          }
          for (int64_t q = 0; q < group; q++)
            tiles.of[0][nv][height](row, l.columns + k0, k1 - k0, packed + q * panel + p * position,
                                    acc + q * acc_panel + p * acc_position + (r - r0) * width, k0 == 0,
                                    q == 0 && !(wrap && p == 15) ? ahead : nullptr, l.columns + k0, Goal{});
          r += height;
        }
    }
    for (int64_t q = 0; q < group; q++)
      transform_out(c, acc + q * acc_panel, acc_position, r0, r1, nv, places[q], sums ? totals : nullptr);
    n0 += group * width;
    left -= group * nv;
  }
  if (sums)
    for (int64_t r = r0; r < r1; r++) sums[r] += hsum(*(const V*)(totals + (r - r0) * L));
}
