// Normal and uniform numbers of one chain a lane: xoshiro256+ (Blackman & Vigna 2021), seeded by
// splitmix64, and Box & Muller's transform. What a chain gets depends on the seed and its number
// alone, not on the width of a register nor on the thread.
typedef unsigned long long U __attribute__((vector_size(W * 8), aligned(W * 8), may_alias));
struct Stream { U a, b, c, d; };

static unsigned long long mixed(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

static Stream stream(unsigned long long seed, unsigned long long first) {
  const unsigned long long step = 0x9e3779b97f4a7c15ULL;
  Stream s;
  for (long l = 0; l < W; l++) {
    unsigned long long at = mixed(seed + step) ^ mixed((first + l + 1) * 0xd1342543de82ef95ULL);
    s.a[l] = mixed(at += step); s.b[l] = mixed(at += step);
    s.c[l] = mixed(at += step); s.d[l] = mixed(at += step);
  }
  return s;
}

// In (0, 1], 52 bits.
INLINE V uniform(Stream& s) {
  const U bits = s.a + s.d, t = s.b << 17;
  s.c ^= s.a; s.d ^= s.b; s.b ^= s.c; s.a ^= s.d; s.c ^= t;
  s.d = (s.d << 45) | (s.d >> 19);
  return 2.0 - (V)((bits >> 12) | 0x3ff0000000000000ULL);
}

// Rows of n normal numbers and the logarithm of a uniform one, for chains first ... first + W - 1.
extern "C" void noise(V* out, I seed, long first, long rows, long n) {
  Stream s = stream(seed, first);
  for (long t = 0; t < rows; t++, out += n + 1) {
    for (long k = 0; k < n; k += 2) {
      const V radius = vsqrt(-2.0 * vlog(uniform(s))), angle = 6.283185307179586477 * uniform(s);
      out[k] = radius * vcos(angle);
      if (k + 1 < n) out[k + 1] = radius * vsin(angle);
    }
    out[n] = vlog(uniform(s));
  }
}
