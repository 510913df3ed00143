/* device/sim/op_table.c - the list of all operations. */
#include "device/sim/interpreter_internal.h"

#include <stdio.h>
#include <string.h>

static const mil_op_type *const FAMILIES[] = {MIL_ELEMENTWISE, MIL_SHAPES, MIL_PRODUCTS,
                                              MIL_REDUCTIONS, MIL_QUANTIZERS};
#define FAMILY_N ((int32_t)(sizeof FAMILIES / sizeof FAMILIES[0]))

const mil_op_type *mil_op_find(mil_span name) {
    for (int32_t f = 0; f < FAMILY_N; f++)
        for (const mil_op_type *type = FAMILIES[f]; type->name != NULL; type++)
            if (*type->name == *name.p && mil_span_is(name, type->name)) return type;
    return NULL;
}

const char *anepy_mil_op_name(int32_t index) {
    if (index == 0) return "const"; /* handled by the parser; all others are in the families */
    for (int32_t f = 0; f < FAMILY_N && index > 0; f++)
        for (const mil_op_type *type = FAMILIES[f]; type->name != NULL; type++)
            if (--index == 0) return type->name;
    return NULL;
}

/* Operations of MIL that the ANE does not have (docs/neural-engine.md#operations), and what to do.
 */
const char *mil_op_refused(mil_span name) {
    static const struct {
        const char *names, *why;
    } LIST[] = {
        {" gather gather_along_axis gather_nd scatter scatter_along_axis scatter_nd one_hot ",
         "look-ups stay on the host, or become a matmul with one-hot rows"},
        {" cumsum ", "write a matmul with a triangular constant"},
        {" argmax argmin reduce_argmax reduce_argmin reduce_prod non_zero mod random_bernoulli "
         "random_categorical random_normal random_uniform ",
         "do it on the host"},
        {" logical_and logical_or logical_xor logical_not ", "combine 0 and 1 by mul and maximum"},
        {" slice_update band_part ", "multiply with a constant mask instead"},
        {" gru lstm rnn ", "recurrent layers must be unrolled"},
        {" tan sinh cosh ", "compose it from sin, cos or exp"},
        {" cond while_loop ", "control flow does not compile"},
    };
    char word[40];
    if (name.n > (int32_t)sizeof word - 3) return NULL;
    snprintf(word, sizeof word, " %.*s ", name.n, name.p);
    for (size_t i = 0; i < sizeof LIST / sizeof LIST[0]; i++)
        if (strstr(LIST[i].names, word) != NULL) return LIST[i].why;
    return NULL;
}
