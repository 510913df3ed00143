/* groups.h - the groups of checks, one function each. */
#ifndef GROUPS_H
#define GROUPS_H

#include "kernels/kernels.h"

/* Sizes around the edges of 4, 8 and 16 lanes and of panels, primes, nothing at all. */
extern const int32_t SIZES[];
extern const int32_t SIZE_N;

/* What the command line says must be the case; NULL and 0: nothing. */
extern const char *expected_isa;
extern int32_t expected_threads;

/* Function `name` of a kernel table, which then counts as checked. */
#define KERNEL(table, name) (note_kernel(#name), (table)->name)
void note_kernel(const char *name);

void checks_harness(void);
void checks_table(void);
void checks_products(void);
void checks_elementwise(void);
void checks_columns(void);
void checks_exp(void);
void checks_adam(void);
void checks_half(void);
void checks_fixed(void);
void checks_bf16(void);
void checks_gemm(void);
void checks_pool(void);
void checks_runtime(void);
void checks_model(void);
void checks_engine(void);
void checks_batch(void);
void checks_masks(void);
void checks_packing(void);
void checks_recompute(void);
void checks_optimizers(void);
void checks_frozen(void);
void checks_handles(void);
void checks_weights(void);
void checks_ready(void);
void checks_decoder(void);
void checks_adapters(void);
void checks_storage(void);

#endif
