// The state machine of bayesgen.inference.hamiltonian.trajectory on plain memory, chains moved together only
// for their gradients. Layouts are those of the tensors there. Kept beside `advance`, to which it is
// equal up to rounding; tests/inference/test_native.py holds the two together.
enum { STEP, DEPTH, LEAF, SIDE, LOG_TREE, LOG_SUB, START, ACCEPT, STEPS, WORST, LP_TREE, ENERGY_TREE,
       LP_SUB, ENERGY_SUB, NUMBERS };
enum { Q, P, G, VELOCITY, KINDS };
enum { STATISTICS = 8 };

struct Metric { long size, rank; const double *mass, *root, *basis, *stretch; };

struct Block {
  I chains, size, slots, rank;
  double *ends, *points, *sums, *checks, *numbers;
  const double *mass, *root, *basis, *stretch;
  const double *normal, *uniform;
  I rows;       // of the tape of momenta; a chain that has used them up ends the block
  I *used;      // momenta of each chain used so far
  I *at, steps; // next row of uniform numbers, and the row to stop before
  I enough;     // trajectories ended in this call after which to return
  double* records;
  I ended;      // trajectories ended in this call
  I stale;      // whether random numbers had been used up before it, so that nothing was done
  V *x, *g, *lp, *w;
  const double* C;
  const I* J;
  double* scratch;  // 2 * size numbers
  double step_size, max_depth;
};

#define EACH(k, n) _Pragma("omp simd") for (long k = 0; k < (n); k++)

static void copy(double* to, const double* from, long n) { EACH(k, n) to[k] = from[k]; }

static double inner(const double* a, const double* b, long n) {
  double s = 0.0;
#pragma omp simd reduction(+ : s)
  for (long k = 0; k < n; k++) s += a[k] * b[k];
  return s;
}

// to += basis (stretch * basis^T from); rows of m.basis are the directions
static void along(double* to, const double* from, const Metric& m, const double* stretch) {
  const long n = m.size;
  for (long j = 0; j < m.rank; j++) {
    const double* b = m.basis + j * n;
    const double part = stretch[j] * inner(b, from, n);
    EACH(k, n) to[k] += part * b[k];
  }
}

// out = M^-1 p
static void velocity(double* out, const double* p, const Metric& m, double* scratch) {
  const long n = m.size;
  if (!m.rank) {
    EACH(k, n) out[k] = m.mass[k] * p[k];
    return;
  }
  double* sum = scratch + n;
  EACH(k, n) sum[k] = scratch[k] = m.root[k] * p[k];
  along(sum, scratch, m, m.stretch);
  EACH(k, n) out[k] = m.root[k] * sum[k];
}

// out = M^(1/2) z
static void momentum(double* out, const double* z, const Metric& m) {
  const long n = m.size;
  copy(out, z, n);
  along(out, z, m, m.stretch + m.rank);
  EACH(k, n) out[k] /= m.root[k];
}

static double log_add(double a, double b) {
  if (a == b) return a + 0.69314718055994530942;
  const double m = a > b ? a : b;
  return m == -__builtin_inf() ? m : m + log1p(exp((a > b ? b : a) - m));
}

static bool turning(const double* left, const double* right, const double* sum, const double* before,
                    const double* p, long n) {
  double a = 0.0, b = 0.0;
#pragma omp simd reduction(+ : a, b)
  for (long k = 0; k < n; k++) {
    const double span = sum[k] - 0.5 * p[k] - before[k];
    a += left[k] * span;
    b += right[k] * span;
  }
  return a <= 0.0 || b <= 0.0;
}

// After the gradient: what becomes of chain i. Returns whether its trajectory ended.
static bool settle(Block& s, const Metric& m, long i, double lp, const double* u) {
  const long n = s.size;
  double* num = s.numbers + i * NUMBERS;
  double* ends = s.ends + i * 2 * KINDS * n;
  const int right = num[SIDE] > 0.5;
  double* end = ends + right * KINDS * n;
  double *q = end + Q * n, *p = end + P * n, *g = end + G * n, *v = end + VELOCITY * n;
  double *tree = s.points + i * 4 * n, *sub = tree + 2 * n;
  double *tree_sum = s.sums + i * 2 * n, *sub_sum = tree_sum + n;
  const double eps = right ? num[STEP] : -num[STEP];
  EACH(k, n) p[k] += 0.5 * eps * g[k];
  velocity(v, p, m, s.scratch);
  const double energy = 0.5 * inner(p, v, n) - lp;
  double delta = num[START] - energy;
  if (delta < -1.7976931348623157e308) delta = -1.7976931348623157e308;
  if (delta != delta) delta = -__builtin_inf();
  if (delta > 1.7976931348623157e308) delta = 1.7976931348623157e308;
  const bool diverging = delta < -1000.0;
  if (__builtin_fabs(delta) > __builtin_fabs(num[WORST])) num[WORST] = -delta;
  num[ACCEPT] += exp(delta < 0.0 ? delta : 0.0);
  num[STEPS] += 1.0;

  // the leaf joins its subtree
  num[LOG_SUB] = log_add(num[LOG_SUB], delta);
  if (log(u[0]) < delta - num[LOG_SUB]) {
    num[LP_SUB] = lp;
    num[ENERGY_SUB] = energy;
    copy(sub, q, n);
    copy(sub + n, g, n);
  }
  EACH(k, n) sub_sum[k] += p[k];
  const I leaf = (I)num[LEAF];
  long last = 0, ones = 0;
  for (I rest = leaf >> 1; rest; rest >>= 1) last += rest & 1;
  for (I rest = leaf; rest & 1; rest >>= 1) ones++;
  double *speeds = s.checks + i * 2 * s.slots * n, *spans = speeds + s.slots * n;
  bool turned = false;
  if (!ones) {
    copy(speeds + last * n, v, n);
    EACH(k, n) spans[last * n + k] = sub_sum[k] - 0.5 * p[k];
  }
  for (long k = last - ones + 1; k <= last && !turned; k++)
    turned = turning(speeds + k * n, v, sub_sum, spans + k * n, p, n);

  // a finished subtree joins the tree
  num[LEAF] += 1.0;
  const bool bad = turned || diverging;
  const bool merge = !bad && num[LEAF] >= (double)(1LL << (I)num[DEPTH]);
  bool stop = bad;
  if (merge) {
    if (log(u[1]) < num[LOG_SUB] - num[LOG_TREE]) {
      num[LP_TREE] = num[LP_SUB];
      num[ENERGY_TREE] = num[ENERGY_SUB];
      copy(tree, sub, 2 * n);
    }
    num[LOG_TREE] = log_add(num[LOG_TREE], num[LOG_SUB]);
    EACH(k, n) tree_sum[k] += sub_sum[k];
    num[DEPTH] += 1.0;
    const double *p0 = ends + P * n, *p1 = ends + (KINDS + P) * n;
    const double *v0 = ends + VELOCITY * n, *v1 = ends + (KINDS + VELOCITY) * n;
    double a = 0.0, b = 0.0;
#pragma omp simd reduction(+ : a, b)
    for (long k = 0; k < n; k++) {
      const double span = tree_sum[k] - 0.5 * (p0[k] + p1[k]);
      a += v0[k] * span;
      b += v1[k] * span;
    }
    stop = a <= 0.0 || b <= 0.0 || num[DEPTH] >= s.max_depth;
  }
  if (stop) {
    double* row = s.records + s.ended * (1 + 2 * n + STATISTICS);
    row[0] = (double)i;
    copy(row + 1, tree, 2 * n);
    row += 1 + 2 * n;
    row[0] = num[LP_TREE];
    row[1] = num[ENERGY_TREE];
    row[2] = num[DEPTH] + (bad ? 1.0 : 0.0);
    row[3] = num[ACCEPT] / num[STEPS];
    row[4] = num[STEPS];
    row[5] = diverging ? 1.0 : 0.0;
    row[6] = num[STEP];
    row[7] = num[WORST];
  }
  if (merge || stop) {
    num[SIDE] = u[2] < 0.5 ? 1.0 : 0.0;
    num[LEAF] = 0.0;
    num[LOG_SUB] = -__builtin_inf();
    EACH(k, n) sub_sum[k] = 0.0;
  }
  return stop;
}

// A new trajectory of chain i from where the last one's draw lies.
static void restart(Block& s, const Metric& m, long i) {
  const long n = s.size;
  double* num = s.numbers + i * NUMBERS;
  double *left = s.ends + i * 2 * KINDS * n, *right = left + KINDS * n;
  const double* tree = s.points + i * 4 * n;
  const double* z = s.normal + (s.used[i]++ * s.chains + i) * n;
  copy(left + Q * n, tree, n);
  copy(left + G * n, tree + n, n);
  momentum(left + P * n, z, m);
  velocity(left + VELOCITY * n, left + P * n, m, s.scratch);
  copy(right, left, KINDS * n);
  copy(s.sums + i * 2 * n, left + P * n, n);
  const double energy = 0.5 * inner(z, z, n) - num[LP_TREE];
  num[STEP] = s.step_size;
  num[DEPTH] = num[LOG_TREE] = num[ACCEPT] = num[STEPS] = num[WORST] = 0.0;
  num[START] = num[ENERGY_TREE] = num[ENERGY_SUB] = energy;
  num[LP_SUB] = num[LP_TREE];
}

extern "C" void advance(Block* block) {
  Block& s = *block;
  const Metric m = {s.size, s.rank, s.mass, s.root, s.basis, s.stretch};
  const long n = s.size, blocks = (s.chains + W - 1) / W;
  bool room = *s.at < s.steps;
  for (long i = 0; i < s.chains; i++) room = room && s.used[i] < s.rows;
  s.ended = 0;
  s.stale = !room;
  while (*s.at < s.steps && s.ended < s.enough && room) {
    for (long i = 0; i < s.chains; i++) {
      const double* num = s.numbers + i * NUMBERS;
      const int right = num[SIDE] > 0.5;
      double* end = s.ends + (i * 2 + right) * KINDS * n;
      double *q = end + Q * n, *p = end + P * n, *g = end + G * n, *v = end + VELOCITY * n;
      const double eps = right ? num[STEP] : -num[STEP];
      EACH(k, n) p[k] += 0.5 * eps * g[k];
      velocity(v, p, m, s.scratch);
      EACH(k, n) q[k] += eps * v[k];
      double* x = (double*)(s.x + (i / W) * n) + i % W;
      for (long k = 0; k < n; k++) x[k * W] = q[k];
    }
    evaluate(s.x, s.lp, s.g, s.w, s.C, s.J, blocks, n);
    const double* u = s.uniform + *s.at * s.chains * 3;
    for (long i = 0; i < s.chains; i++, u += 3) {
      const int right = s.numbers[i * NUMBERS + SIDE] > 0.5;
      double* g = s.ends + ((i * 2 + right) * KINDS + G) * n;
      const double* from = (const double*)(s.g + (i / W) * n) + i % W;
      for (long k = 0; k < n; k++) g[k] = from[k * W];
      if (!settle(s, m, i, s.lp[i / W][i % W], u)) continue;
      s.ended++;
      restart(s, m, i);
      room = room && s.used[i] < s.rows;
    }
    ++*s.at;
  }
}
