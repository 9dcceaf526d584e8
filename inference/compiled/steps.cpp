// Optimiser steps one after the other: `evaluate` is the whole step of bayesgen.inference.variational.native.
// What moves stands first in x; then what the step reads, a row of the table, all lanes alike.
extern "C" void steps(V* x, V* lp, V* g, V* w, const double* C, const I* J, long size, long moving,
                      long fed, const double* table, double* numbers, long count) {
  for (long k = 0; k < count; k++) {
    for (long j = 0; j < fed; j++) x[moving + j] = all(table[k * fed + j]);
    evaluate(x, lp, g, w, C, J, 1, size);
    numbers[3 * k] = lp[0][0];
    numbers[3 * k + 1] = g[moving][0];
    numbers[3 * k + 2] = g[moving + 1][0];
    for (long j = 0; j < moving; j++) x[j] = g[j];
  }
}
