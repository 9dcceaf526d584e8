// Leapfrog paths of many chains, W at a time: kept beside bayesgen.inference.leapfrog.Paths, to which
// it is equal up to rounding. All arrays are row-major, (chains, size); kick is (chains, size), or
// (size, size) with drift its transpose.
struct Paths {
  I chains, size, steps, dense;
  const double *q, *r, *g, *kick, *drift;
  double *q_end, *r_end, *lp_end, *g_end;
};

static void spread(V* out, const double* rows, long first, long chains, long n) {
  for (long l = 0; l < W; l++) {  // lanes beyond the last chain repeat it
    const double* row = rows + (first + l < chains ? first + l : chains - 1) * n;
    double* o = (double*)out + l;
    for (long k = 0; k < n; k++) o[k * W] = row[k];
  }
}

static void gather(double* rows, const V* from, long first, long chains, long n) {
  for (long l = 0; l < W && first + l < chains; l++) {
    double* row = rows + (first + l) * n;
    const double* f = (const double*)from + l;
    for (long k = 0; k < n; k++) row[k] = f[k * W];
  }
}

// to += share * by * what
static void push(V* to, const V* what, const V* by, const double* matrix, V* room, double share, long n) {
  if (!matrix) {
    for (long k = 0; k < n; k++) to[k] += share * by[k] * what[k];
    return;
  }
  columns(room, matrix, n, n, n, 1, what, 1);
  for (long k = 0; k < n; k++) to[k] += share * room[k];
}

// Blocks of W chains from block `first` to before block `last`; room: 5 * size vectors.
extern "C" void paths(const Paths* p, long first, long last, V* room, V* w, const double* C, const I* J) {
  const long n = p->size;
  V *q = room, *r = q + n, *g = r + n, *by = g + n, *spare = by + n, lp;
  const double *kick = p->dense ? p->kick : 0, *drift = p->dense ? p->drift : 0;
  for (long b = first; b < last; b++) {
    spread(q, p->q, b * W, p->chains, n);
    spread(r, p->r, b * W, p->chains, n);
    spread(g, p->g, b * W, p->chains, n);
    if (!p->dense) spread(by, p->kick, b * W, p->chains, n);
    push(r, g, by, kick, spare, 0.5, n);
    for (long s = 0; s < p->steps; s++) {
      push(q, r, by, drift, spare, 1.0, n);
#ifdef SLOPE
      if (s + 1 < p->steps) slope::density(q, &lp, g, w, C + SLOPE_C, J + SLOPE_J);
      else
#endif
      density(q, &lp, g, w, C, J);
      push(r, g, by, kick, spare, s + 1 < p->steps ? 1.0 : 0.5, n);
    }
    gather(p->q_end, q, b * W, p->chains, n);
    gather(p->r_end, r, b * W, p->chains, n);
    gather(p->g_end, g, b * W, p->chains, n);
    gather(p->lp_end, &lp, b * W, p->chains, 1);
  }
}
