/* A layer for up to four rows of x: W is decoded into registers, and never written to memory or a cache. With AVX-512
   in every type, with AVX2 and NEON in fp32. The products are in fp32 for every type: vdpbf16ps was as fast for one row
   (Intel Xeon with AMX). */
enum { MOST_FEW = 4 };

/* x in fp32 with the even ones of each 2 EVEN numbers before the odd ones, as `look_up_group` gives the weights. */
static void even_before_odd(float *out, const void *x, int type, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * EVEN)
        for (int k = 0; k < EVEN; k++) {
            out[i + k] = load(x, i + 2 * k, type);
            out[i + EVEN + k] = load(x, i + 2 * k + 1, type);
        }
}

/* Adds the products of x and OUTPUTS rows of W, whose first weights are `begin`. */
static inline __attribute__((always_inline)) void add_products(const int rows, const int type, const Layer *layer,
                                                               const int64_t *begin, Lanes (*total)[OUTPUTS]) {
    const Weight weight = *layer->w, *w = &weight; /* a copy, whose fields the compiler keeps in registers */
    const float *x = layer->x;
    const uint8_t *packed[OUTPUTS];
    for (int j = 0; j < OUTPUTS; j++) packed[j] = w->packed + begin[j] / 2;
    uint64_t next = OUTPUTS * w->columns; /* weights further on are the next outputs, which are prefetched */
    int64_t block = (int64_t)1 << w->block_shift, run = w->columns % block ? GROUP : block; /* weights of one scale */
    for (int64_t k = 0; k < w->columns; k += run) {
        float scale[OUTPUTS];
        Table table[OUTPUTS];
        Lanes sums[MOST_FEW][OUTPUTS];
        for (int j = 0; j < OUTPUTS; j++) {
            scale[j] = scale_of_block(w, (begin[j] + k) >> w->block_shift);
            table[j] = TABLE_HAS_SCALE ? table_of(w->levels, scale[j], type) : layer->levels;
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < OUTPUTS; j++) sums[m][j] = TABLE_HAS_SCALE ? total[m][j] : zeros();
        for (uint64_t g = k; g < (uint64_t)(k + run); g += GROUP) {
            Lanes weights[OUTPUTS][GROUP / LANES];
            for (int j = 0; j < OUTPUTS; j++) {
                __builtin_prefetch(packed[j] + (next + g) / 2);
                look_up_group(packed[j] + g / 2, &table[j], weights[j]);
            }
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < GROUP / LANES; i++) {
                    Lanes here = read_once(x + m * w->columns + g + i * LANES);
                    for (int j = 0; j < OUTPUTS; j++) sums[m][j] = add_product(sums[m][j], weights[j][i], here);
                }
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < OUTPUTS; j++)
                total[m][j] = TABLE_HAS_SCALE ? sums[m][j] : add_product(total[m][j], all(scale[j]), sums[m][j]);
    }
}

/* Adds the adapter to the sums of OUTPUTS outputs, and stores them. */
static inline __attribute__((always_inline)) void finish(const int rows, const Layer *layer, int64_t output,
                                                         Lanes (*total)[OUTPUTS]) {
    int64_t r = layer->r, whole = r / LANES * LANES;
    for (int j = 0; j < OUTPUTS && output + j < layer->w->rows; j++) {
        const float *xa = layer->xa, *b = layer->b + (output + j) * r;
        for (int64_t k = 0; k < whole; k += LANES) {
            Lanes values = rounded(read(b + k), layer->type);
            for (int m = 0; m < rows; m++) total[m][j] = add_product(total[m][j], values, read(xa + m * r + k));
        }
        for (int m = 0; m < rows; m++) {
            float sum = sum_of(total[m][j]);
            for (int64_t k = whole; k < r; k++) sum += xa[m * r + k] * to_type(b[k], layer->type);
            store_output(layer, m, output + j, sum);
        }
    }
}

static inline __attribute__((always_inline)) void some_rows(const int rows, const int type, const Layer *layer,
                                                            int64_t output) {
    int64_t begin[OUTPUTS];
    for (int j = 0; j < OUTPUTS; j++) begin[j] = min64(output + j, layer->w->rows - 1) * layer->w->columns;
    Lanes total[MOST_FEW][OUTPUTS];
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < OUTPUTS; j++) total[m][j] = zeros();
    add_products(rows, type, layer, begin, total);
    finish(rows, layer, output, total);
}

static inline __attribute__((always_inline)) void rows_of_type(const int type, const Layer *layer, int64_t output) {
    if (layer->rows == 1) some_rows(1, type, layer, output);
    else if (layer->rows == 2) some_rows(2, type, layer, output);
    else if (layer->rows == 3) some_rows(3, type, layer, output);
    else some_rows(4, type, layer, output);
}

/* OUTPUTS outputs of all rows, compiled for each number of rows and type. Inlined into the loop with many_rows, it would be
   slower by 5%. */
static __attribute__((noinline)) void few_rows(const Layer *layer, int64_t output) {
    if (layer->type == FP32) rows_of_type(FP32, layer, output);
    else if (layer->type == BF16) rows_of_type(BF16, layer, output);
    else rows_of_type(FP16, layer, output);
}
