/* The interface of an eviction policy over blocks that are numbered 0..num_blocks-1.
 *
 * It follows eviction/policy.py: a policy orders what its tier holds, and is told what comes, is used and leaves. Paths
 * are told tail first. A policy that has nothing to do for one of the verbs leaves it NULL.
 *
 *   expect   a block that is not in the tier will be added; called before room is made for it
 *   add      a block comes; is_hit: the request that brings it found it in a tier below
 *   touch    a block that is in the tier is used: it was on the path of a request
 *   hold     a block is in use, and no victim, until `release`; at the end of the request it is touched. Where the two
 *            are NULL that says all
 *   victims  names up to n blocks, the next to leave first, and changes no membership
 *   leave    a victim leaves
 *   discard  a block leaves that is none: it is over, or moved to another tier
 *   used     a request has come
 *   admits   how many of the first of `wanted`, blocks of a path, are worth what they push out, each the victim beside it
 *   ended    a request has ended, with what its end told; its path is given root first
 *   free     gives back what `make` took beside the memory of the play
 */
#ifndef KVTIERS_SWEEP_POLICY_H
#define KVTIERS_SWEEP_POLICY_H

#include "../../eviction/_told.h"
#include "_sweep_links.h"

typedef struct Policy Policy;

typedef struct {
    const char *name;
    int touches_new; /* at the end of a request the blocks that it brought are touched, too */
    void *(*make)(Memory *memory, int32_t num_blocks, int64_t capacity);
    void (*expect)(void *order, int32_t block);
    void (*add)(void *order, int32_t block, int is_hit);
    void (*touch)(void *order, int32_t block);
    void (*hold)(void *order, int32_t block);
    void (*release)(void *order, int32_t block);
    int64_t (*victims)(void *order, int64_t n, int32_t *out);
    void (*leave)(void *order, int32_t block);
    void (*discard)(void *order, int32_t block);
    void (*used)(void *order, double now);
    int64_t (*admits)(void *order, const int32_t *path, int32_t length, Told told, const int32_t *wanted, int64_t num,
                      const int32_t *victims, int64_t num_victims, double now);
    void (*ended)(void *order, const int32_t *path, int32_t length, Told told, double now);
    void (*free)(void *order);
} PolicyKind;

#endif
