// Winograd's minimal filtering F(2×2, 3×3) over active sets: 16 products where a 3×3 convolution has 36 (Lavin and Gray
// 2016, arXiv:1509.09308, section 4.1). A tile is 2×2 pixels of the output; each of its 16 positions in the transformed
// domain is a product of matrices of its own, by the tiles of kernel.inl. Weights are transformed in each run, those that
// are active only: that takes a few percent of the products' time, and all of them would be 16/9 of the model's. Included
// by kernel.inl.

// What a panel holds at once: a block of channels of all positions stays in the second-level cache.
constexpr int64_t W_BLOCK = 128;
// Positions lie a cache line further apart than their size, a power of two, which would put them in the same sets.
constexpr int64_t APART = 16;

// to[t * pitch + j] = tap t of channel columns[j] of a row of the weight; those of the next row are fetched meanwhile.
GP_INLINE void gather_taps(const float* row, const float* next, const int32_t* columns, int64_t n, float* to,
                           int64_t pitch) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const float* of[4];
    for (int i = 0; i < 4; i++) {
      of[i] = row + 9 * columns[j + i];
      __builtin_prefetch(next + 9 * columns[j + i]);
      __builtin_prefetch(next + 9 * columns[j + i] + 8);
    }
    for (int t = 0; t < 8; t += 4) transpose4(of[0] + t, of[1] + t, of[2] + t, of[3] + t, to + t * pitch + j, pitch);
    for (int i = 0; i < 4; i++) to[8 * pitch + j + i] = of[i][8];
  }
  for (; j < n; j++)
    for (int t = 0; t < 9; t++) to[t * pitch + j] = row[9 * columns[j] + t];
}

// to[p * position + (r - r0) * pitch + k - k0] = G g G^T at position p, of active rows [r0, r1) and columns [k0, k1).
GP_INLINE void transform_weights(const Layer& l, int64_t r0, int64_t r1, int64_t last, int64_t k0, int64_t k1,
                                 float* to, int64_t pitch, int64_t position) {
  alignas(64) float taps[9 * W_BLOCK] = {};
  for (int64_t r = r0; r < r1; r++, to += pitch) {
    gather_taps(row_of(l, r), row_of(l, std::min(r + 1, last)), l.columns + k0, k1 - k0, taps, pitch);
    for (int64_t k = 0; k < pitch; k += L) {
      V w[12];
      GP_UNROLL for (int j = 0; j < 3; j++) {
        const V a = *(const V*)(taps + j * pitch + k), b = *(const V*)(taps + (3 + j) * pitch + k),
                c = *(const V*)(taps + (6 + j) * pitch + k);
        w[j] = a;
        w[3 + j] = 0.5f * (a + c + b);
        w[6 + j] = 0.5f * (a + c - b);
        w[9 + j] = c;
      }
      GP_UNROLL for (int i = 0; i < 4; i++) {
        const V a = w[3 * i], b = w[3 * i + 1], c = w[3 * i + 2];
        float* at = to + 4 * i * position + k;
        *(V*)at = a;
        *(V*)(at + position) = 0.5f * (a + c + b);
        *(V*)(at + 2 * position) = 0.5f * (a + c - b);
        *(V*)(at + 3 * position) = c;
      }
    }
  }
}

// Into the second-level cache: part p of 16 of what `transform_weights` will read, rows [r0, r1) and columns [k0, k1).
GP_INLINE void fetch_weights(const Layer& l, int64_t r0, int64_t r1, int64_t k0, int64_t k1, int64_t p) {
  const int64_t begin = 9 * l.columns[k0], end = 9 * (l.columns[k1 - 1] + 1);
  for (int64_t r = r0 + (r1 - r0) * p / 16; r < r0 + (r1 - r0) * (p + 1) / 16; r++)
    for (int64_t i = begin; i < end; i += 16) __builtin_prefetch(row_of(l, r) + i, 0, 2);
}

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
        w[12 + j] = d[12 + j] - d[4 + j];
      }
      GP_UNROLL for (int i = 0; i < 16; i += 4) {
        *(V*)(to + i * position) = w[i] - w[i + 2];
        *(V*)(to + (i + 1) * position) = w[i + 1] + w[i + 2];
        *(V*)(to + (i + 2) * position) = w[i + 2] - w[i + 1];
        *(V*)(to + (i + 3) * position) = w[i + 3] - w[i + 1];
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

// y = A^T m, of the values m[i] at the points 0, 1, -1 and infinity.
GP_INLINE void inverse(const V* m, V& first, V& second) {
  first = m[0] + m[1] + m[2];
  second = m[1] - m[2] + m[3];
}

// y = A^T m A of rows [r0, r1), and what follows it. acc: (16, rows, nv, L).
GP_INLINE void transform_out(const Winograd& c, const float* acc, int64_t position, int64_t r0, int64_t r1, int nv,
                             const Places* places, float* totals) {
  const Layer& l = c.layer;
  for (int64_t r = r0; r < r1; r++) {
    const int64_t row = r * l.ldy;
    const V bias = splat(l.bias ? l.bias[row_number(l, r)] : 0.f), gain = splat(l.gain ? l.gain[r] : 1.f);
    V total = totals ? *(const V*)(totals + (r - r0) * L) : V{};
    for (int v = 0; v < nv; v++, acc += L) {
      V s[2][4];
      GP_UNROLL for (int j = 0; j < 4; j++) {
        V m[4];
        GP_UNROLL for (int i = 0; i < 4; i++) m[i] = *(const V*)(acc + (4 * i + j) * position);
        inverse(m, s[0][j], s[1][j]);
      }
      GP_UNROLL for (int i = 0; i < 2; i++) {
        V even, odd, low, high;
        inverse(s[i], even, odd);
        interleave((even + bias) * gain, (odd + bias) * gain, low, high);
        total += finish_row(l, low, high, places[v], row + i * c.out_width, i);
      }
    }
    if (totals) *(V*)(totals + (r - r0) * L) = total;
  }
}

// The last tiles, where they would leave a vector nearly empty: their products run along the weights' rows instead, as
// those of single pixels in last.inl, a vector of channels at once.
constexpr int64_t MAX_TILES = L / 4;

struct LastTiles {
  int64_t count = 0, first = 0, pitch = 0;  // tiles, and floats of each at a position
  float *x = nullptr, *sums = nullptr;      // (16, count, pitch), transformed; (rows, count, 16)
};

static int64_t last_tiles_scratch(int64_t channels, int64_t rows) {
  return 16 * MAX_TILES * (whole_vectors(channels) + rows);
}

static LastTiles last_tiles(const Layer& l, int64_t begin, int64_t end, int64_t rows, float* memory) {
  LastTiles a;
  const int64_t rest = (end - begin) % L;
  if (end - begin < L || rest == 0 || rest > MAX_TILES) return a;
  a.count = rest;
  a.first = end - rest;
  a.pitch = whole_vectors(l.channels);
  a.x = memory;
  a.sums = memory + 16 * rest * a.pitch;
  std::memset(memory, 0, 16 * rest * (a.pitch + rows) * sizeof(float));
  return a;
}

// The channels [k0, k1) of the last tiles to a.x; `memory` for a vector of tiles at 16 positions.
GP_INLINE void pack_tiles(const Layer& l, const LastTiles& a, int64_t k0, int64_t k1, float* memory) {
  const int64_t position = L * W_BLOCK + APART;
  Gather gather;
  plan(l, a.first, 1, gather);
  transform_in<1>(l, gather, k0, k1, memory, position);
  for (int64_t p = 0; p < 16; p++)
    for (int64_t t = 0; t < a.count; t++)
      for (int64_t k = k0; k < k1; k++) a.x[(p * a.count + t) * a.pitch + k] = memory[p * position + (k - k0) * L + t];
}

// a.sums += transformed weights times tiles, of rows [s0, s1) of those from r0 on and so many channels from k0 on.
GP_INLINE void multiply_tiles(const LastTiles& a, const float* w, int64_t pitch, int64_t position, int64_t r0, int64_t s0,
                              int64_t s1, int64_t k0, int64_t channels) {
  for (int64_t r = s0; r < s1; r++, w += pitch)
    for (int64_t t = 0; t < a.count; t++) {
      float* sums = a.sums + ((r - r0) * a.count + t) * 16;
      for (int64_t p = 0; p < 16; p += 4) {
        V s[4] = {};
        for (int64_t k = 0; k < channels; k += L)  // both end in zeros
          GP_UNROLL for (int i = 0; i < 4; i++)
            s[i] += *(const V*)(w + (p + i) * position + k) * *(const V*)(a.x + ((p + i) * a.count + t) * a.pitch + k0 + k);
        *(QU*)(sums + p) += hsums(s);
      }
    }
}

// y = A^T m A of row r, and what follows it; |y| to `totals` if not null.
GP_INLINE void finish_tiles(const Winograd& c, const LastTiles& a, int64_t r0, int64_t r, float* totals) {
  const Layer& l = c.layer;
  const V bias = splat(l.bias ? l.bias[row_number(l, r)] : 0.f), gain = splat(l.gain ? l.gain[r] : 1.f);
  for (int64_t t = 0; t < a.count; t++) {
    const float* m = a.sums + ((r - r0) * a.count + t) * 16;
    float s[2][4];
    for (int j = 0; j < 4; j++) {
      s[0][j] = m[j] + m[4 + j] + m[8 + j];
      s[1][j] = m[4 + j] - m[8 + j] + m[12 + j];
    }
    V v = V{};
    for (int i = 0; i < 2; i++) {
      v[2 * i] = s[i][0] + s[i][1] + s[i][2];
      v[2 * i + 1] = s[i][1] - s[i][2] + s[i][3];
    }
    v = (v + bias) * gain;
    const int64_t n = a.first + t, h = 2 * (n / l.width), w = 2 * (n % l.width), at = r * l.ldy + h * c.out_width + w;
    const bool inside[4] = {true, w + 1 < c.out_width, h + 1 < c.out_height,
                            w + 1 < c.out_width && h + 1 < c.out_height};
    for (int i = 0; i < 4 && l.residual; i++)
      if (inside[i]) v[i] += l.residual[at + i / 2 * c.out_width + i % 2];
    v = activate(v, l.activation);
    for (int i = 0; i < 4; i++) {
      if (!inside[i]) continue;
      l.y[at + i / 2 * c.out_width + i % 2] = v[i];
      if (totals) totals[i] += std::fabs(v[i]);
    }
  }
}

// Panels that share each weight, as in kernel.inl; a panel is sixteen times as large here.
constexpr int64_t W_LEAST_GROUP = std::max<int64_t>(1, 32 / PANEL), W_MAX_GROUP = std::max<int64_t>(2, 64 / PANEL);

// Weights that several groups of panels share are transformed once, if they take no more floats than that.
constexpr int64_t W_KEPT = 2 << 20;

// How the work is cut: into groups of panels, each by blocks of channels and STEP rows. The weights of a block are
// transformed where they are needed, in memory that the next block takes, unless there are other groups to keep them for.
struct WinogradPlan {
  int64_t pitch, position, block;  // floats: of a row of transformed weights, between positions, and of a block
  int64_t row_blocks, all;         // how many blocks of rows there are, and how many in all
  int64_t group;                   // panels
  bool keep;
  WinogradPlan(int64_t channels, int64_t rows, int64_t tiles) {
    group = 64 * rows * channels > (512 << 10) ? W_MAX_GROUP : W_LEAST_GROUP;
    pitch = whole_vectors(std::min(channels, W_BLOCK));
    position = STEP * pitch + APART;
    block = 16 * position;
    row_blocks = (rows + STEP - 1) / STEP;
    all = row_blocks * ((channels + W_BLOCK - 1) / W_BLOCK);
    keep = split((tiles + L - 1) / L).count > group && all * block <= W_KEPT;
  }
};

// For so many rows and tiles or fewer: of fewer rows, weights may be kept where those of all are not.
static int64_t winograd_scratch(int64_t channels, int64_t rows, int64_t tiles) {
  const WinogradPlan how(channels, rows, tiles);
  const int64_t weights = std::max(how.block, std::min(how.all * how.block, W_KEPT));
  const int64_t panels = W_MAX_GROUP * 16 * (PANEL * (W_BLOCK + rows) + 2 * APART);
  return weights + panels + rows * L + last_tiles_scratch(channels, rows);
}

GP_TARGET static void winograd(const Winograd& c, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* memory,
                               float* sums) {
  static const TileTable tiles;
  static const auto identity = [] {
    std::array<int32_t, W_BLOCK> columns;
    std::iota(columns.begin(), columns.end(), 0);
    return columns;
  }();
  const Layer& l = c.layer;
  Range later = l.ahead;
  const int64_t rows = r1 - r0, begin = h0 * l.width, end = h1 * l.width;
  const WinogradPlan how(l.channels, rows, end - begin);
  float* totals = memory;
  if (sums) std::memset(totals, 0, rows * L * sizeof(float));
  float* last = totals + rows * L;
  const LastTiles rest = last_tiles(l, begin, end, rows, last);
  float *weights = last + last_tiles_scratch(l.channels, rows), *packed = weights + (how.keep ? how.all : 1) * how.block;
  Gather gather[W_MAX_GROUP];
  Places places[W_MAX_GROUP][GP_MAX_NV];
  const int64_t position = PANEL * W_BLOCK + APART, panel = 16 * position;
  const int64_t acc_position = PANEL * rows + APART, acc_panel = 16 * acc_position;
  float* acc = packed + how.group * panel;
  for (int64_t left = (end - begin + L - 1) / L - (rest.count > 0), n0 = begin; left > 0;) {
    const Panels all = split(left), g = all.first(std::min(how.group, all.count));
    for (int64_t q = 0; q < g.count; q++) {
      const int64_t first = n0 + g.start(q) * L;
      plan(l, first, g.vectors(q), gather[q]);
      for (int v = 0; v < g.vectors(q); v++) plan_out(c, first + v * L, end, places[q][v]);
    }
    for (int64_t k0 = 0; k0 < l.channels || k0 == 0; k0 += W_BLOCK) {
      const int64_t k1 = std::min(l.channels, k0 + W_BLOCK);
      if (rest.count && n0 == begin) pack_tiles(l, rest, k0, k1, packed);
      for (int64_t q = 0; q < g.count; q++) {
        float* to = packed + q * panel;
        GP_OF_WIDTH(g.vectors(q), transform_in, l, gather[q], k0, k1, to, position);
      }
      for (int64_t s0 = r0; s0 < r1; s0 += STEP) {
        const int64_t s1 = std::min(s0 + STEP, r1);
        const int64_t kept = how.keep ? k0 / W_BLOCK * how.row_blocks + (s0 - r0) / STEP : 0;
        float* w = weights + kept * how.block;
        const bool transform = !how.keep || n0 == begin, wrap = s1 == r1;
        if (transform) transform_weights(l, s0, s1, r1 - 1, k0, k1, w, how.pitch, how.position);
        const int64_t next = wrap ? r0 : s1, next_k0 = wrap ? k1 : k0;
        for (int64_t p = 0; p < 16; p++) {
          if (transform && next_k0 < l.channels)
            fetch_weights(l, next, std::min(next + STEP, r1), next_k0, std::min(next_k0 + W_BLOCK, l.channels), p);
          for (int64_t q = 0; q < g.count; q++) {
            const int nv = g.vectors(q), tall = TILE_ROWS[nv];
            for (int64_t r = s0; r < s1; r += tall) {
              const int height = int(std::min<int64_t>(tall, s1 - r));
              const float* row[16];
              for (int i = 0; i < height; i++) row[i] = w + p * how.position + (r - s0 + i) * how.pitch;
              tiles.of[0][nv][height](row, identity.data(), k1 - k0, packed + q * panel + p * position,
                                      acc + q * acc_panel + p * acc_position + (r - r0) * nv * L, k0 == 0, nullptr,
                                      nullptr, Goal{nullptr, 0, 0, nullptr, {}, take(later, k1 - k0)});
            }
          }
        }
        if (rest.count && n0 == begin) {
          multiply_tiles(rest, w, how.pitch, how.position, r0, s0, s1, k0, k1 - k0);
          for (int64_t r = s0; r < s1 && k1 == l.channels; r++)
            finish_tiles(c, rest, r0, r, sums ? totals + (r - r0) * L : nullptr);
        }
        if (k1 == l.channels)
          for (int64_t q = 0; q < g.count; q++)
            transform_out(c, acc + q * acc_panel + (s0 - r0) * g.vectors(q) * L, acc_position, s0, s1, g.vectors(q),
                          places[q], sums ? totals + (s0 - r0) * L : nullptr);
      }
    }
    n0 += g.start(g.count) * L;
    left -= g.start(g.count);
  }
  if (sums)
    for (int64_t r = r0; r < r1; r++) sums[r] += hsum(*(const V*)(totals + (r - r0) * L));
}
