// Leapfrog paths of many chains, W at a time: kept beside bayesgen.inference.hamiltonian.leapfrog.Paths, to which
// it is equal up to rounding. All arrays are row-major, (chains, size). Diagonal metrics: kick is
// (chains, size), step size times factor. Dense ones: (size, size), as are drift, its transpose, and
// square, drift times kick transposed: with velocities in units of a step, one product with square
// moves them on, and momenta are needed at the end of a path alone.
struct Paths {
  I chains, size, steps, dense;
  const double *q, *r, *g, *kick, *drift, *square;
  double *q_end, *r_end, *lp_end, *g_end;
};

// Whole transitions: momenta, a path, Metropolis' rule.
struct Moves {
  I chains, size, count, dense, seed, samples, first;
  const I* steps;  // (count,), leapfrogs of each
  const double *kick, *drift, *square;
  double *q, *g, *lp, *draws, *statistics;  // draws (chains, samples, size), written from `first` on
  double step_size;
};

enum { LP, ENERGY, ACCEPTANCE, N_STEPS, DIVERGING, STEP_SIZE, MOVED };

static void spread(V* out, const double* rows, long first, long chains, long n) {
  for (long l = 0; l < W; l++) {  // lanes beyond the last chain repeat it
    const double* row = rows + (first + l < chains ? first + l : chains - 1) * n;
    double* o = (double*)out + l;
    for (long k = 0; k < n; k++) o[k * W] = row[k];
  }
}

static void gather(double* rows, const V* from, long first, long chains, long n, long apart) {
  for (long l = 0; l < W && first + l < chains; l++) {
    double* row = rows + (first + l) * apart;
    const double* f = (const double*)from + l;
    for (long k = 0; k < n; k++) row[k] = f[k * W];
  }
}

static void slope_of(const V* q, V* lp, V* g, bool last, V* w, const double* C, const I* J) {
#ifdef SLOPE
  if (!last) return slope::density(q, lp, g, w, C + SLOPE_C, J + SLOPE_J);
#endif
  density(q, lp, g, w, C, J);
}

// One path, in place. room: 3 * n vectors; `by` is a diagonal metric's kick.
template <class P>
static void path(const P* p, long steps, const V* by, V* q, V* r, V* g, V* lp, V* room, V* w,
                 const double* C, const I* J) {
  const long n = p->size;
  if (!p->dense) {
    for (long k = 0; k < n; k++) r[k] += 0.5 * by[k] * g[k];
    for (long s = 0; s < steps; s++) {
      const bool last = s + 1 == steps;
      for (long k = 0; k < n; k++) q[k] += by[k] * r[k];
      slope_of(q, lp, g, last, w, C, J);
      for (long k = 0; k < n; k++) r[k] += (last ? 0.5 : 1.0) * by[k] * g[k];
    }
    return;
  }
  V *v = room, *sum = v + n, *product = sum + n;
  columns(v, p->drift, n, n, n, 1, r, 1);
  columns(product, p->square, n, n, n, 1, g, 1);
  for (long k = 0; k < n; k++) {
    v[k] += 0.5 * product[k];
    sum[k] = 0.5 * g[k];
  }
  for (long s = 0; s < steps; s++) {
    const bool last = s + 1 == steps;
    for (long k = 0; k < n; k++) q[k] += v[k];
    slope_of(q, lp, g, last, w, C, J);
    for (long k = 0; k < n; k++) sum[k] += (last ? 0.5 : 1.0) * g[k];
    if (last) break;
    columns(product, p->square, n, n, n, 1, g, 1);
    for (long k = 0; k < n; k++) v[k] += product[k];
  }
  columns(product, p->kick, n, n, n, 1, sum, 1);
  for (long k = 0; k < n; k++) r[k] += product[k];
}

// Blocks of W chains from block `first` to before block `last`; room: 7 * size vectors.
extern "C" void paths(const Paths* p, long first, long last, V* room, V* w, const double* C, const I* J) {
  const long n = p->size;
  V *q = room, *r = q + n, *g = r + n, *by = g + n, lp;
  for (long b = first; b < last; b++) {
    spread(q, p->q, b * W, p->chains, n);
    spread(r, p->r, b * W, p->chains, n);
    spread(g, p->g, b * W, p->chains, n);
    if (!p->dense) spread(by, p->kick, b * W, p->chains, n);
    path(p, p->steps, by, q, r, g, &lp, by + n, w, C, J);
    gather(p->q_end, q, b * W, p->chains, n, n);
    gather(p->r_end, r, b * W, p->chains, n, n);
    gather(p->g_end, g, b * W, p->chains, n, n);
    gather(p->lp_end, &lp, b * W, p->chains, 1, 1);
  }
}

INLINE V half_square(const V* r, long n) {
  V total = zero();
  for (long k = 0; k < n; k++) total += r[k] * r[k];
  return 0.5 * total;
}

static void note(const Moves* m, long block, long t, const V* q, const V* numbers) {
  const long row = m->first + t;
  gather(m->draws + row * m->size, q, block * W, m->chains, m->size, m->samples * m->size);
  gather(m->statistics + row * MOVED, numbers, block * W, m->chains, MOVED, m->samples * MOVED);
}

// As ManyChains._transition, `count` times. room: 9 * size + count * (size + 1) vectors.
extern "C" void moves(const Moves* m, long first, long last, V* room, V* w, const double* C, const I* J) {
  const long n = m->size;
  V *q = room, *g = q + n, *q1 = g + n, *g1 = q1 + n, *by = g1 + n, *spare = by + n, *tape = spare + 3 * n;
  V lp, lp1, numbers[MOVED];
  for (long b = first; b < last; b++) {
    spread(q, m->q, b * W, m->chains, n);
    spread(g, m->g, b * W, m->chains, n);
    spread(&lp, m->lp, b * W, m->chains, 1);
    if (!m->dense) spread(by, m->kick, b * W, m->chains, n);
    noise(tape, m->seed, b * W, m->count, n);
    V* r = tape;
    for (long t = 0; t < m->count; t++, r += n + 1) {
      const V start = half_square(r, n) - lp;
      for (long k = 0; k < n; k++) { q1[k] = q[k]; g1[k] = g[k]; }
      path(m, m->steps[t], by, q1, r, g1, &lp1, spare, w, C, J);
      const V end = half_square(r, n) - lp1;
      V delta = start - end;
      delta = pick(visnan(delta), all(-__builtin_inf()), delta);
      const M accepted = r[n] < delta;
      for (long k = 0; k < n; k++) { q[k] = pick(accepted, q1[k], q[k]); g[k] = pick(accepted, g1[k], g[k]); }
      lp = pick(accepted, lp1, lp);
      numbers[LP] = lp;
      numbers[ENERGY] = pick(accepted, end, start);
      numbers[ACCEPTANCE] = vexp(vmin(delta, zero()));
      numbers[N_STEPS] = all((double)m->steps[t]);
      numbers[DIVERGING] = number(delta < -1000.0);
      numbers[STEP_SIZE] = all(m->step_size);
      note(m, b, t, q, numbers);
    }
    gather(m->q, q, b * W, m->chains, n, n);
    gather(m->g, g, b * W, m->chains, n, n);
    gather(m->lp, &lp, b * W, m->chains, 1, 1);
  }
}
