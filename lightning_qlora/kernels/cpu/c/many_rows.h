/* A layer for more rows of x: STEP bytes of TILE outputs of W are decoded into a tile in the L1 cache, and multiplied with
   all rows. ROWS x SIDE sums are in registers. The adapter's A and B are multiplied in the same way. */
enum { SIDE = 4, TILE = 8, STEP = 2048, MOST_ROWS = 64 }; /* MOST_ROWS of x in a call: library.py */
enum { LINE = 64 };                                       /* bytes of a line of a cache */

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

static void copy_dense(const Product *p, char *out, int64_t begin, int64_t n) {
    const float *from = p->dense + begin;
    if (p->pairs)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = to_bf16(from[i]);
    else if (p->type == FP32) memcpy(out, from, n * sizeof(float));
    else
        for (int64_t i = 0; i < n; i++) ((float *)out)[i] = to_type(from[i], p->type);
}

static void decode(const Product *p, char *out, int64_t begin, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * LINE) /* of the next outputs: layers in the L3 cache are twice as fast */
        __builtin_prefetch(p->w->packed + ((begin + TILE * p->inputs + i) >> 1));
    if (p->pairs) decode_bf16(p->w, begin, begin + n, (uint16_t *)out);
    else if (p->type == FP32) decode_fp32(p->w, begin, begin + n, (float *)out);
    else if (p->type == BF16) decode_bf16_in_fp32(p->w, begin, begin + n, (float *)out);
    else decode_fp16_in_fp32(p->w, begin, begin + n, (float *)out);
}

/* Adds the products of ROWS rows and SIDE outputs of a tile. gcc 12 keeps an array in memory if the loops over it are not
   unrolled. */
static inline __attribute__((always_inline)) void add_tile(const int pairs, const char *x, const char *tile,
                                                           int64_t bytes, Lanes *total) {
    Lanes sums[ROWS][SIDE];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int j = 0; j < SIDE; j++) sums[m][j] = total[m * TILE + j];
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
        for (int j = 0; j < SIDE; j++) total[m * TILE + j] = sums[m][j];
}

/* Adds the products of all rows and TILE outputs, from `output` on. */
static void add_tiles(const Product *p, int64_t output, Lanes (*total)[TILE]) {
    char tile[TILE * STEP] __attribute__((aligned(LINE)));
    const char *x = p->rows;
    int64_t size = size_of(p), step = STEP / size;
    for (int64_t k = 0; k < p->inputs; k += step) {
        int64_t n = min64(step, p->inputs - k), bytes = up_to(n * size, LINE);
        for (int j = 0; j < TILE; j++) {
            char *row = tile + j * bytes;
            int64_t begin = min64(output + j, p->outputs - 1) * p->inputs + k;
            if (p->w) decode(p, row, begin, n);
            else copy_dense(p, row, begin, n);
            memset(row + n * size, 0, bytes - n * size);
        }
        for (int64_t m = 0; m < p->count; m += ROWS, x += ROWS * bytes)
            for (int j = 0; j < TILE; j += SIDE) {
                if (p->pairs) add_tile(1, x, tile + j * bytes, bytes, total[m] + j);
                else add_tile(0, x, tile + j * bytes, bytes, total[m] + j);
            }
    }
}

/* The products of all rows and TILE outputs, from `output` on. */
static void multiply_tiles(const Product *p, const Product *added, int64_t output, float (*out)[TILE]) {
    Lanes total[MOST_ROWS + ROWS][TILE];
    memset(total, 0, up_to(p->count, ROWS) * sizeof total[0]);
    add_tiles(p, output, total);
    if (added) add_tiles(added, output, total);
    for (int64_t m = 0; m < p->count; m++)
        for (int j = 0; j < TILE; j += 4) sums_of_four(total[m] + j, out[m] + j);
}

/* x A^T: [count, outputs]. */
static void project(const Product *p, float *out) {
    float sums[MOST_ROWS][TILE];
    for (int64_t output = 0; output < p->outputs; output += TILE) {
        multiply_tiles(p, NULL, output, sums);
        for (int64_t m = 0; m < p->count; m++)
            for (int j = 0; j < TILE && output + j < p->outputs; j++) out[m * p->outputs + output + j] = sums[m][j];
    }
}

/* TILE outputs of all rows: x W^T and the adapter's x A^T B^T. */
static void many_rows(const Layer *layer, const Product *large, const Product *small, int64_t output) {
    float sums[MOST_ROWS][TILE];
    multiply_tiles(large, small, output, sums);
    for (int64_t m = 0; m < large->count; m++)
        for (int j = 0; j < TILE && output + j < large->outputs; j++) store_output(layer, m, output + j, sums[m][j]);
}
