/* What the end of a request told; UNKNOWN where it told nothing. */
#ifndef KVTIERS_TOLD_H
#define KVTIERS_TOLD_H

#include <stdint.h>

enum { UNKNOWN = -1 };

typedef struct {
    int32_t reason; /* a number for each */
    int32_t last_turn, reply_tokens;
} Told;

#endif
