/* Memory of one play: arrays that are made while it is set up and leave together at its end. */
#ifndef KVTIERS_SWEEP_MEMORY_H
#define KVTIERS_SWEEP_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    void **arrays;
    size_t num_arrays;
    int has_failed; /* an array could not be had: what was set up must not be used */
} Memory;

/* An array of zeros; NULL where there is no memory, which `has_failed` tells later. */
static void *new_array(Memory *memory, size_t num_items, size_t item_bytes)
{
    void **arrays = realloc(memory->arrays, (memory->num_arrays + 1) * sizeof *arrays);
    if (arrays != NULL)
        memory->arrays = arrays;
    void *array = arrays == NULL ? NULL : calloc(num_items ? num_items : 1, item_bytes);
    if (array == NULL)
        memory->has_failed = 1;
    else
        memory->arrays[memory->num_arrays++] = array;
    return array;
}

static void free_memory(Memory *memory)
{
    while (memory->num_arrays)
        free(memory->arrays[--memory->num_arrays]);
    free(memory->arrays);
    memory->arrays = NULL;
}

#endif
