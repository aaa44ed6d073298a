// Bilinear interpolation of one channel. Along a row of the input first: it serves two rows of the output and more.
// Included by kernel.inl.

GP_INLINE void stretch(const Axis& to, const float* row, float* out) {
  for (int64_t w = 0; w < to.count; w += L) {
    V a = V{}, b = V{};
    const int64_t live = std::min<int64_t>(L, to.count - w);
    for (int64_t i = 0; i < live; i++) {
      a[i] = row[to.first[w + i]];
      b[i] = row[to.second[w + i]];
    }
    *(V*)(out + w) = load_part(to.near + w, live) * a + load_part(to.far + w, live) * b;
  }
}

// lines: two rows of the output, of whole vectors and aligned.
GP_TARGET static void resize(const Resize& s, const float* x, float* y, float* lines) {
  const int64_t n = s.columns.count;
  float *upper = lines, *lower = lines + whole_vectors(n);
  int64_t in_upper = -1, in_lower = -1;  // rows of the input
  for (int64_t h = 0; h < s.rows.count; h++, y += n) {
    const int64_t above = s.rows.first[h], below = s.rows.second[h];
    if (in_lower == above) {
      std::swap(upper, lower);
      std::swap(in_upper, in_lower);
    }
    if (in_upper != above) stretch(s.columns, x + above * s.width, upper), in_upper = above;
    if (in_lower != below) stretch(s.columns, x + below * s.width, lower), in_lower = below;
    const V near = splat(s.rows.near[h]), far = splat(s.rows.far[h]);
    int64_t w = 0;
    for (; w + L <= n; w += L) store(y + w, near * *(const V*)(upper + w) + far * *(const V*)(lower + w));
    if (w < n) store_part(y + w, near * *(const V*)(upper + w) + far * *(const V*)(lower + w), n - w);
  }
}
