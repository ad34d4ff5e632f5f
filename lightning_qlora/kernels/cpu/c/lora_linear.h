/* A layer, y = x W^T + bias + s (x A^T) B^T, that decodes W inside the product. */
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
#include "lanes.h"

typedef struct { /* a call of `lora_linear` */
    const Weight *w;
    const float *x;  /* [rows, in], with `even_before_odd`, for few rows */
    void *y;
    int64_t rows;
    int type;
    const void *bias;
    int bias_type;
    const float *xa; /* [rows, r], times the scaling */
    const float *b;
    int64_t r;
    Table levels;
} Layer;

static inline void store_output(const Layer *layer, int64_t row, int64_t output, float sum) {
    if (layer->bias) sum += load(layer->bias, output, layer->bias_type);
    store(layer->y, row * layer->w->rows + output, layer->type, sum);
}

#include "few_rows.h"
#include "many_rows.h"

/* y [rows, out] = x [rows, in] W^T + bias + scaling xa B^T, summed in fp32 and rounded once, with W [out, in] and
   B [out, r], which is rounded to the type of x; bias [out] may be NULL. xa [rows, r] is x A^T in the type of x; if it is
   NULL it is computed with A [r, in]. workspace: 2 (rows + 3) (in + r + 16) floats, aligned to LINE. */
void lora_linear(const Weight *w, const void *x, void *y, int type, int64_t rows, const void *bias, int bias_type,
                 const void *xa, const float *a, const float *b, int64_t r, float scaling, float *workspace,
                 int threads) {
    int few = rows <= MOST_FEW && w->columns % GROUP == 0 && (type == FP32 || TABLE_HAS_SCALE);
    Product large = {w, NULL, w->rows, w->columns, type, has_pairs(type), NULL, rows};
    Product small = {NULL, b, w->rows, r, type, 0, NULL, rows};
    char *end = (char *)workspace;
    if (!few || !xa) end = arrange_rows(&large, x, type, end);
    float *projected = (float *)end;
    if (!xa) {
        Product first = {NULL, a, r, w->columns, type, large.pairs, large.rows, rows};
        project(&first, projected);
    }
    for (int64_t i = 0; i < rows * r; i++)
        projected[i] = scaling * (xa ? load(xa, i, type) : to_type(projected[i], type));
    float *rest = projected + up_to(rows * r, LINE / sizeof(float));
    Layer layer = {w, rest, y, rows, type, bias, bias_type, projected, b, r, table_of(w->levels, 1, FP32)};
    if (few) even_before_odd(rest, x, type, rows * w->columns);
    else arrange_rows(&small, projected, FP32, (char *)rest);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t output = 0; output < w->rows; output += few ? OUTPUTS : TILE) {
        if (few) few_rows(&layer, output);
        else many_rows(&layer, &large, &small, output);
    }
}
#endif
