// 7×7 convolutions of stride 2, the first layer of many networks, by minimal filtering: 81 products of each channel where
// there were 196. Rows and columns of the input are even or odd; the four phases are images of their own, of which the
// kernel's taps see 4×4, 4×3, 3×4 and 3×3, with stride 1. So they are by F(2, 4) and F(2, 3), nested, which have the points
// 0, 1, -1 and infinity in common; only F(2, 4) has a fifth one, 2. What phases give at a point is added up in the product
// of matrices there, as if they were channels. Included by kernel.inl.

constexpr int POINTS = 5, POSITIONS = POINTS * POINTS;

// How many phases have a product at a point.
GP_INLINE constexpr int phases_at(int point) { return point == 4 ? 1 : 2; }
// Which column of the product at the point (i, j) is phase (a, b) of channel k of so many.
GP_INLINE int64_t column_of(int i, int j, int a, int b, int64_t k, int64_t channels) {
  return (a * phases_at(j) + b) * channels + k;
}

// to[i * step] = (G g)[i] of the taps g[i * stride] of a phase.
template <int PHASE>
GP_INLINE void transform_taps(const V* g, int stride, V* to, int step) {
  const V a = g[0], b = g[stride], c = g[2 * stride];
  if (PHASE == 0) {
    const V d = g[3 * stride];
    to[0] = 0.5f * a;
    to[step] = -0.5f * ((a + c) + (b + d));
    to[2 * step] = (-1 / 6.f) * ((a + c) - (b + d));
    to[3 * step] = d;
    to[4 * step] = (1 / 6.f) * ((a + 4.f * c) + 2.f * (b + 4.f * d));
  } else {
    to[0] = a;
    to[step] = 0.5f * ((a + c) + b);
    to[2 * step] = 0.5f * ((a + c) - b);
    to[3 * step] = c;
  }
}

// to[i * step] = (B^T d)[i] of the pixels d[i * stride] of a phase.
template <int PHASE>
GP_INLINE void transform_pixels(const V* d, int stride, V* to, int step) {
  const V a = d[0], b = d[stride], c = d[2 * stride], e = d[3 * stride];
  if (PHASE == 0) {
    const V ec = e - c, b2 = b + b;
    to[0] = (e - b) + 2.f * (a - c);
    to[step] = ec - b2;
    to[2 * step] = (ec - c) + (b2 - c);
    to[3 * step] = (d[4 * stride] - c) - 2.f * (e - b);
    to[4 * step] = e - b;
  } else {
    to[0] = a - c;
    to[step] = b + c;
    to[2 * step] = c - b;
    to[3 * step] = e - b;
  }
}

// Phase (A, B) of 7×7 taps, g[t] tap t, to the positions that it has: u[i * POINTS + j].
template <int A, int B>
GP_INLINE void transform_phase_taps(const V* g, V* u) {
  V w[4 * POINTS];
  GP_UNROLL for (int j = 0; j < 4 - B; j++) transform_taps<A>(g + A * 7 + 2 * j + B, 14, w + j, 4);
  GP_UNROLL for (int i = 0; i < POINTS - A; i++) transform_taps<B>(w + 4 * i, 1, u + i * POINTS, 1);
}

// to[p * position + (r - r0) * pitch + column] = the transformed weights of active rows [r0, r1), a vector of rows at once.
GP_INLINE void transform_kernels(const Layer& l, int64_t r0, int64_t r1, float* to, int64_t pitch, int64_t position) {
  for (int64_t r = r0; r < r1; r += L)
    for (int64_t k = 0; k < l.channels; k++) {
      V g[49], u[POSITIONS];
      const float* row[L];
      for (int i = 0; i < L; i++) row[i] = row_of(l, std::min(r + i, r1 - 1)) + 49 * l.columns[k];
      for (int t = 0; t < 49; t++)
        GP_UNROLL for (int i = 0; i < L; i++) g[t][i] = row[i][t];
      for (int a = 0; a < 2; a++)
        for (int b = 0; b < 2; b++) {
          switch (2 * a + b) {
            case 0: transform_phase_taps<0, 0>(g, u); break;
            case 1: transform_phase_taps<0, 1>(g, u); break;
            case 2: transform_phase_taps<1, 0>(g, u); break;
            default: transform_phase_taps<1, 1>(g, u);
          }
          for (int i = 0; i < POINTS - a; i++)
            for (int j = 0; j < POINTS - b; j++) {
              float* at = to + (i * POINTS + j) * position + (r - r0) * pitch + column_of(i, j, a, b, k, l.channels);
              for (int64_t n = 0; n < std::min<int64_t>(L, r1 - r); n++) at[n * pitch] = u[i * POINTS + j][n];
            }
        }
    }
}

// Phase (A, B) of channel k in the tiles of vector v: to[p * position + (column * NV + v) * L].
template <int NV, int A, int B>
GP_INLINE void transform_phase(const Layer& l, const Gather& g, int64_t k, int v, float* to, int64_t position) {
  const float* from = l.x + k * l.plane;
  const Piece *first = g.piece + g.begin[v], *end = g.piece + g.begin[v + 1];
  const auto offset = [&](int i, int j) { return l.tap_offset[(2 * i + A) * 9 + 2 * j + B]; };
  V d[POSITIONS], w[POSITIONS];
  GP_UNROLL for (int i = 0; i < POINTS - A; i++)
    GP_UNROLL for (int j = 0; j < POINTS - B; j++) d[i * POINTS + j] = load(from + offset(i, j) + first->offset);
  for (const Piece* p = first + 1; p < end; p++)
    GP_UNROLL for (int i = 0; i < POINTS - A; i++)
      GP_UNROLL for (int j = 0; j < POINTS - B; j++)
        d[i * POINTS + j] = load_over(d[i * POINTS + j], from + offset(i, j) + p->offset, p->lanes);
  GP_UNROLL for (int j = 0; j < POINTS - B; j++) transform_pixels<A>(d + j, POINTS, w + j, POINTS);
  GP_UNROLL for (int i = 0; i < POINTS - A; i++) {
    V u[POINTS];
    transform_pixels<B>(w + i * POINTS, 1, u, 1);
    GP_UNROLL for (int j = 0; j < POINTS - B; j++)
      *(V*)(to + (i * POINTS + j) * position + (column_of(i, j, A, B, k, l.channels) * NV + v) * L) = u[j];
  }
}

template <int NV>
GP_TARGET static void transform_phases(const Layer& l, const Gather& g, float* to, int64_t position) {
  for (int64_t k = 0; k < l.channels; k++)
    for (int v = 0; v < NV; v++) {
      transform_phase<NV, 0, 0>(l, g, k, v, to, position);
      transform_phase<NV, 0, 1>(l, g, k, v, to, position);
      transform_phase<NV, 1, 0>(l, g, k, v, to, position);
      transform_phase<NV, 1, 1>(l, g, k, v, to, position);
    }
}

// Where a position's values lie: floats from one to the next, of weights, of a panel, and of the products of a tile's rows.
struct PhasesPlan {
  int64_t pitch, weights, panel, products;
  PhasesPlan(int64_t channels, int64_t rows)
      : pitch(whole_vectors(4 * channels)),
        weights(rows * pitch + APART),
        panel(GP_MAX_NV * L * 4 * channels + APART),
        products(MOST_PRODUCTS * L + APART) {}
  static constexpr int64_t MOST_PRODUCTS = 24;  // vectors of a tile
};

static int64_t phases_scratch(int64_t channels, int64_t rows) {
  const PhasesPlan how(channels, rows);
  return POSITIONS * (how.weights + how.panel + how.products) + rows * L;
}

GP_TARGET static void phases(const Winograd& c, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* memory,
                             float* sums) {
  static const TileTable tiles;
  const Layer& l = c.layer;
  Range later = l.ahead;
  const int64_t rows = r1 - r0, begin = h0 * l.width, end = h1 * l.width;
  const PhasesPlan how(l.channels, rows);
  float *totals = memory, *weights = totals + rows * L, *packed = weights + POSITIONS * how.weights,
        *products = packed + POSITIONS * how.panel;
  std::vector<int32_t> identity(4 * l.channels);
  std::iota(identity.begin(), identity.end(), 0);
  if (sums) std::memset(totals, 0, rows * L * sizeof(float));
  transform_kernels(l, r0, r1, weights, how.pitch, how.weights);
  const Panels panels = split((end - begin + L - 1) / L);
  for (int64_t q = 0; q < panels.count; q++) {
    const int64_t n0 = begin + panels.start(q) * L;
    const int nv = panels.vectors(q), tall = TILE_ROWS[nv];
    Gather gather;
    Places places[GP_MAX_NV];
    plan(l, n0, nv, gather);
    for (int v = 0; v < nv; v++) plan_out(c, n0 + v * L, end, places[v]);
    switch (nv) {
      case 1: transform_phases<1>(l, gather, packed, how.panel); break;
      case 2: transform_phases<2>(l, gather, packed, how.panel); break;
#if GP_MAX_NV > 2
      case 3: transform_phases<3>(l, gather, packed, how.panel); break;
      default: transform_phases<4>(l, gather, packed, how.panel);
#endif
    }
    for (int64_t r = 0; r < rows; r += tall) {
      const int height = int(std::min<int64_t>(tall, rows - r));
      for (int i = 0; i < POINTS; i++)
        for (int j = 0; j < POINTS; j++) {
          const int64_t p = i * POINTS + j, depth = phases_at(i) * phases_at(j) * l.channels;
          const float* row[16];
          for (int h = 0; h < height; h++) row[h] = weights + p * how.weights + (r + h) * how.pitch;
          Fetch fetch;  // where a row's pixels will be written, in two rows of the map
          if (p < height) {
            const float* to = l.y + (r0 + r + p) * l.ldy + places[0].place[0].at;
            fetch = {reinterpret_cast<const char*>(to), 8, c.out_width * 4, cache_lines(2 * nv * L)};
          }
          tiles.of[0][nv][height](row, identity.data(), depth, packed + p * how.panel, products + p * how.products, true,
                                  nullptr, nullptr, Goal{nullptr, 0, 0, nullptr, fetch, take(later, depth)});
        }
      transform_out<POINTS>(c, products, how.products, r0 + r, r0 + r + height, nv, places,
                            sums ? totals + r * L : nullptr);
    }
  }
  if (sums)
    for (int64_t r = r0; r < r1; r++) sums[r] += hsum(*(const V*)(totals + (r - r0) * L));
}
