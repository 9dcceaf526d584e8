// Prelude of every generated density: one number of all chains that move together is a vector V of
// W doubles, one truth value a vector M of W masks (0 or -1). W is set by the compiler's -DW=.
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
typedef double V __attribute__((vector_size(W * 8), aligned(W * 8), may_alias));
typedef long long M __attribute__((vector_size(W * 8), aligned(W * 8), may_alias));
typedef long long I;

INLINE V all(double x) { V r; for (int l = 0; l < W; l++) r[l] = x; return r; }
INLINE M truth(I x) { M r; for (int l = 0; l < W; l++) r[l] = x ? -1 : 0; return r; }
INLINE V pick(M m, V a, V b) { return m ? a : b; }
INLINE V number(M m) { return m ? all(1.0) : all(0.0); }
INLINE M truth(V x) { return x != 0.0; }
INLINE M both(M a, M b, M c) { return (a & b) | (~a & c); }
INLINE V zero() { return all(0.0); }

extern "C" {
#define ONE(name) double name(double) __attribute__((const));
ONE(exp) ONE(log) ONE(log1p) ONE(expm1) ONE(sqrt) ONE(sin) ONE(cos) ONE(tan) ONE(tanh) ONE(sinh)
ONE(cosh) ONE(asin) ONE(acos) ONE(atan) ONE(erf) ONE(erfc) ONE(log2) ONE(log10) ONE(exp2)
ONE(floor) ONE(ceil) ONE(rint) ONE(trunc) ONE(asinh) ONE(acosh) ONE(atanh) ONE(cbrt)
double pow(double, double) __attribute__((const));
double atan2(double, double) __attribute__((const));
double hypot(double, double) __attribute__((const));
double lgamma_r(double, int*);
}

// glibc's vector library, four units in the last place; elsewhere the scalar functions, lane by lane.
#if defined(__GLIBC__) || defined(HAVE_MVEC)
#if W == 8 && defined(__AVX512F__)
#define MVEC(name) _ZGVeN8v_##name
#define MVEC2(name) _ZGVeN8vv_##name
#elif W == 4 && defined(__AVX2__)
#define MVEC(name) _ZGVdN4v_##name
#define MVEC2(name) _ZGVdN4vv_##name
#endif
#endif
#ifdef MVEC
#define WIDE(name) \
  extern "C" V MVEC(name)(V) __attribute__((const)); \
  INLINE V v##name(V x) { return MVEC(name)(x); }
extern "C" V MVEC2(pow)(V, V) __attribute__((const));
INLINE V vpow(V x, V y) { return MVEC2(pow)(x, y); }
#else
#define WIDE(name) INLINE V v##name(V x) { V r; for (int l = 0; l < W; l++) r[l] = name(x[l]); return r; }
INLINE V vpow(V x, V y) { V r; for (int l = 0; l < W; l++) r[l] = pow(x[l], y[l]); return r; }
#endif
#define NARROW(name) INLINE V v##name(V x) { V r; for (int l = 0; l < W; l++) r[l] = name(x[l]); return r; }
WIDE(exp) WIDE(log) WIDE(sin) WIDE(cos)
#ifdef MVEC_ALL
WIDE(log1p) WIDE(expm1) WIDE(tan) WIDE(tanh) WIDE(sinh) WIDE(cosh) WIDE(asin) WIDE(acos) WIDE(atan)
WIDE(erf) WIDE(erfc) WIDE(log2) WIDE(log10) WIDE(exp2) WIDE(asinh) WIDE(acosh) WIDE(atanh)
#else
NARROW(log1p) NARROW(expm1) NARROW(tan) NARROW(tanh) NARROW(sinh) NARROW(cosh) NARROW(asin) NARROW(acos)
NARROW(atan) NARROW(erf) NARROW(erfc) NARROW(log2) NARROW(log10) NARROW(exp2) NARROW(asinh)
NARROW(acosh) NARROW(atanh)
#endif
// One instruction; lane by lane it took the compiler ten seconds where a program has 200 of them.
#if defined(__clang__)
INLINE V vsqrt(V x) { return __builtin_elementwise_sqrt(x); }
#elif W == 8 && defined(__AVX512F__)
typedef double Plain __attribute__((vector_size(64)));
INLINE V vsqrt(V x) { return (V)__builtin_ia32_sqrtpd512_mask((Plain)x, (Plain)x, -1, 4); }
#elif W == 4 && defined(__AVX__)
typedef double Plain __attribute__((vector_size(32)));
INLINE V vsqrt(V x) { return (V)__builtin_ia32_sqrtpd256((Plain)x); }
#else
NARROW(sqrt)
#endif
NARROW(floor) NARROW(ceil) NARROW(rint) NARROW(trunc)
INLINE V vatan2(V x, V y) { V r; for (int l = 0; l < W; l++) r[l] = atan2(x[l], y[l]); return r; }
INLINE V vlgamma(V x) { V r; int s; for (int l = 0; l < W; l++) r[l] = lgamma_r(x[l], &s); return r; }

INLINE M visnan(V x) { return x != x; }
INLINE V vabs(V x) { return (V)((M)x & 0x7fffffffffffffffLL); }
INLINE M visinf(V x) { return vabs(x) == __builtin_inf(); }
INLINE M visfinite(V x) { return vabs(x) < __builtin_inf(); }
// As torch: NaN wins.
INLINE V vmax(V a, V b) { return ((a > b) | visnan(a)) ? a : b; }
INLINE V vmin(V a, V b) { return ((a < b) | visnan(a)) ? a : b; }
INLINE V vsign(V x) { return number(x > 0.0) - number(x < 0.0); }
// Of the size of x alone, so that a compiler sees the same exp in a log-sigmoid beside it.
INLINE V vsigmoid(V x) {
  const V e = vexp(-vabs(x)), r = 1.0 / (1.0 + e);
  return x < 0.0 ? e * r : r;
}
INLINE V vsoftplus(V x) { return vmax(x, zero()) + vlog1p(vexp(-vabs(x))); }
INLINE V vsquare(V x) { return x * x; }
INLINE V vlogaddexp(V a, V b) {
  V m = vmax(a, b);
  return (visinf(a) & (a == b)) ? a : m + vlog1p(vexp(-vabs(a - b)));
}
INLINE V vxlogy(V x, V y) { return visnan(y) ? y : ((x == 0.0) ? zero() : x * vlog(y)); }

static double digamma(double x) {
  double r = 0.0, y;
  if (x == 0.0) return -__builtin_copysign(__builtin_inf(), x);
  if (x < 0.0) {
    double whole = trunc(x);
    if (x == whole) return __builtin_nan("");
    const double pi = 3.14159265358979323846;
    return digamma(1.0 - x) - pi / tan(pi * (x - whole));
  }
  for (; x < 10.0; x += 1.0) r -= 1.0 / x;
  if (x == 10.0) return r + 2.25175258906672110764;
  y = 1.0 / (x * x);
  y = x < 1e17 ? y * (8.33333333333333333333e-2 + y * (-8.33333333333333333333e-3 + y * (3.96825396825396825397e-3
      + y * (-4.16666666666666666667e-3 + y * (7.57575757575757575758e-3 + y * (-2.10927960927960927961e-2
      + y * 8.33333333333333333333e-2)))))) : 0.0;
  return r + log(x) - 0.5 / x - y;
}
static double trigamma(double x) {
  double sign = 1.0, r = 0.0;
  const double pi = 3.14159265358979323846;
  if (x < 0.5) {
    sign = -1.0;
    const double s = sin(pi * x);
    r -= pi * pi / (s * s);
    x = 1.0 - x;
  }
  for (int k = 0; k < 6; k++) { r += 1.0 / (x * x); x += 1.0; }
  const double y = 1.0 / (x * x);
  r += (1.0 + 1.0 / (2.0 * x) + y * (1.0 / 6.0 - y * (1.0 / 30.0 - y * (1.0 / 42.0)))) / x;
  return sign * r;
}
NARROW(digamma) NARROW(trigamma)

// Dot products of a vector of numbers by chain with numbers that all share, or with another one.
INLINE V dot(const double* x, long sx, const V* y, long sy, long n) {
  V a = zero(), b = a, c = a, d = a;
  long k = 0;
  for (; k + 3 < n; k += 4) {
    a += x[k * sx] * y[k * sy]; b += x[(k + 1) * sx] * y[(k + 1) * sy];
    c += x[(k + 2) * sx] * y[(k + 2) * sy]; d += x[(k + 3) * sx] * y[(k + 3) * sy];
  }
  for (; k < n; k++) a += x[k * sx] * y[k * sy];
  return (a + b) + (c + d);
}
INLINE V dot(const V* x, long sx, const V* y, long sy, long n) {
  V a = zero(), b = a, c = a, d = a;
  long k = 0;
  for (; k + 3 < n; k += 4) {
    a += x[k * sx] * y[k * sy]; b += x[(k + 1) * sx] * y[(k + 1) * sy];
    c += x[(k + 2) * sx] * y[(k + 2) * sy]; d += x[(k + 3) * sx] * y[(k + 3) * sy];
  }
  for (; k < n; k++) a += x[k * sx] * y[k * sy];
  return (a + b) + (c + d);
}
INLINE V dot(const V* x, long sx, const double* y, long sy, long n) { return dot(y, sy, x, sx, n); }
// out[j] = sum_k x[k, j] y[k] for count columns, column apart, of rows rows, row apart
INLINE void columns(V* out, const double* x, long rows, long row, long count, long column, const V* y, long step) {
  long j = 0;
  for (; j + 8 <= count; j += 8) {
    const double* at = x + j * column;
    V a0 = zero(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    for (long k = 0; k < rows; k++, at += row) {
      const V v = y[k * step];
      a0 += at[0] * v; a1 += at[column] * v; a2 += at[2 * column] * v; a3 += at[3 * column] * v;
      a4 += at[4 * column] * v; a5 += at[5 * column] * v; a6 += at[6 * column] * v; a7 += at[7 * column] * v;
    }
    V* o = out + j;
    o[0] = a0; o[1] = a1; o[2] = a2; o[3] = a3; o[4] = a4; o[5] = a5; o[6] = a6; o[7] = a7;
  }
  for (; j < count; j++) out[j] = dot(x + j * column, row, y, step, rows);
}

static NOINLINE void density(const V* x, V* lp, V* g, V* w, const double* C, const I* J);
extern "C" void evaluate(const V* x, V* lp, V* g, V* w, const double* C, const I* J, long blocks, long size) {
  for (long b = 0; b < blocks; b++) density(x + b * size, lp + b, g + b * size, w, C, J);
}
