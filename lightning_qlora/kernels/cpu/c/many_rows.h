/* A layer for more rows of x: STEP bytes of SIDE outputs of W are decoded into a tile in the L1 cache, which all rows are
   multiplied with, ROWS at a time. The adapter's A and B are multiplied in the same way. */
enum { SIDE = 4, STEP = 2048, LINE = 64, MOST_ROWS = 64 }; /* LINE: of a cache, bytes; MOST_ROWS of x in a call (library.py) */

typedef struct { /* a matrix [outputs, inputs] and rows to multiply it with */
    const Weight *w;    /* the matrix; NULL if it is in `dense` */
    const float *dense; /* rounded to `type` when it is read */
    int64_t outputs, inputs;
    int type;
    int pairs;        /* whether tiles are in bf16, of which an instruction multiplies pairs; else they are in fp32 */
    const char *rows; /* see arrange_rows */
    int64_t count;    /* of rows */
} Product;

static inline int has_pairs(int type) {
#ifdef PAIRS
    return type == BF16;
#else
    return 0;
#endif
}

static inline int64_t size_of(const Product *p) { return p->pairs ? 2 : 4; }
static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* Copies x to `out` as tiles need it: one STEP of all rows, then the next. Zeros fill its last LINE, and add rows up to a
   multiple of ROWS. Returns the end of the copy. */
static char *arrange_rows(Product *p, const void *x, int type, char *out) {
    int64_t size = size_of(p), step = STEP / size;
    p->rows = out;
    for (int64_t k = 0; k < p->inputs; k += step) {
        int64_t n = min64(step, p->inputs - k), bytes = up_to(n * size, LINE);
        for (int64_t m = 0; m < up_to(p->count, ROWS); m++, out += bytes) {
            int64_t begin = m * p->inputs + k, given = m < p->count ? n : 0;
            if (p->pairs) memcpy(out, (const uint16_t *)x + begin, given * size);
            else
                for (int64_t i = 0; i < given; i++) ((float *)out)[i] = load(x, begin + i, type);
            memset(out + given * size, 0, bytes - given * size);
        }
    }
    return out;
}

/* n weights, from `begin` on, as a row of a tile. */
static void fill(const Product *p, char *out, int64_t begin, int64_t n) {
    int64_t bytes = n * size_of(p);
    if (!p->w)
        for (int64_t i = 0; i < n; i++) {
            if (p->pairs) ((uint16_t *)out)[i] = to_bf16(p->dense[begin + i]);
            else ((float *)out)[i] = to_type(p->dense[begin + i], p->type);
        }
    else {
        for (int64_t i = 0; i < n; i += 2 * LINE) /* of the next outputs: three times as fast for layers in the L3 cache */
            __builtin_prefetch(p->w->packed + ((begin + SIDE * p->inputs + i) >> 1));
        if (p->pairs) decode_bf16(p->w, begin, begin + n, (uint16_t *)out);
        else if (p->type == FP32) decode_fp32(p->w, begin, begin + n, (float *)out);
        else if (p->type == BF16) decode_bf16_in_fp32(p->w, begin, begin + n, (float *)out);
        else decode_fp16_in_fp32(p->w, begin, begin + n, (float *)out);
    }
    memset(out + bytes, 0, up_to(bytes, LINE) - bytes);
}

/* Adds the products of ROWS rows and a tile. gcc 12 keeps an array in memory if the loops over it are not unrolled. */
static inline __attribute__((always_inline)) void add_tile(const int pairs, const char *x, const char *tile,
                                                           int64_t bytes, Lanes (*total)[SIDE]) {
    Lanes sums[ROWS][SIDE];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int j = 0; j < SIDE; j++) sums[m][j] = total[m][j];
    for (int64_t i = 0; i < bytes; i += sizeof(Lanes)) {
        Lanes here[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) here[m] = read_once((const float *)(x + m * bytes + i));
#pragma GCC unroll 4
        for (int j = 0; j < SIDE; j++) {
            Lanes weights = read_once((const float *)(tile + j * bytes + i));
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++)
                sums[m][j] = pairs ? add_pairs(sums[m][j], weights, here[m]) : add_product(sums[m][j], weights, here[m]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int j = 0; j < SIDE; j++) total[m][j] = sums[m][j];
}

/* Adds the products of all rows and SIDE outputs, from `output` on. */
static void add_tiles(const Product *p, int64_t output, Lanes (*total)[SIDE]) {
    char tile[SIDE * STEP] __attribute__((aligned(LINE)));
    const char *x = p->rows;
    int64_t size = size_of(p), step = STEP / size;
    for (int64_t k = 0; k < p->inputs; k += step) {
        int64_t n = min64(step, p->inputs - k), bytes = up_to(n * size, LINE);
        for (int j = 0; j < SIDE; j++)
            fill(p, tile + j * bytes, min64(output + j, p->outputs - 1) * p->inputs + k, n);
        for (int64_t m = 0; m < p->count; m += ROWS, x += ROWS * bytes) {
            if (p->pairs) add_tile(1, x, tile, bytes, total + m);
            else add_tile(0, x, tile, bytes, total + m);
        }
    }
}

/* x A^T: [count, outputs]. */
static void project(const Product *p, float *out) {
    for (int64_t output = 0; output < p->outputs; output += SIDE) {
        Lanes total[MOST_ROWS + ROWS][SIDE];
        memset(total, 0, up_to(p->count, ROWS) * sizeof total[0]);
        add_tiles(p, output, total);
        for (int64_t m = 0; m < p->count; m++) {
            float sums[SIDE];
            sums_of_four(total[m], sums);
            for (int j = 0; j < SIDE && output + j < p->outputs; j++) out[m * p->outputs + output + j] = sums[j];
        }
    }
}

/* SIDE outputs of all rows: x W^T and the adapter's x A^T B^T. */
static void many_rows(const Layer *layer, const Product *large, const Product *small, int64_t output) {
    Lanes total[MOST_ROWS + ROWS][SIDE];
    memset(total, 0, up_to(large->count, ROWS) * sizeof total[0]);
    add_tiles(large, output, total);
    add_tiles(small, output, total);
    for (int64_t m = 0; m < large->count; m++) {
        float sums[SIDE];
        sums_of_four(total[m], sums);
        for (int j = 0; j < SIDE && output + j < large->outputs; j++) store_output(layer, m, output + j, sums[j]);
    }
}
