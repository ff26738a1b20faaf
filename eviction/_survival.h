/* Survival tables: how long blocks of a kind wait for their next use. The twin of survival.py, which explains them.
 *
 * Counts are in units of 1 / ONE_OBSERVATION, so that sums do not depend on the order in which they are made.
 */
#ifndef KVTIERS_SURVIVAL_H
#define KVTIERS_SURVIVAL_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_AGES = 56, MAX_CLASSES = 1024, MAX_DEPTH = 8, STEP_CLASSES = 32 };
#define FIRST_AGE_S 0.25
#define AGE_STEP 1.3
#define PARENT_WEIGHT 500.0
#define ROOT_WEIGHT 50.0
#define ROOT_HAZARD 0.03
#define MOST_HAZARD 0.98
#define ONE_OBSERVATION 1048576.0

typedef struct {
    int32_t parent, first_child, sibling; /* 0 for none: the root is nobody's child */
    int32_t feature, depth;
    int64_t events[NUM_AGES], at_risk[NUM_AGES];
    double hazards[NUM_AGES], alive[NUM_AGES]; /* alive: the share that reaches an age */
} Class;

/* worth: of MAX_CLASSES rows, by class and age: uses per second held, at best. */
typedef struct {
    Class *classes;
    double *worth;
    int32_t num_classes, next_update;
    double edges[NUM_AGES + 1], widths[NUM_AGES];
} Survival;

static double *worth_of(const Survival *survival, int32_t number) { return survival->worth + (size_t)number * NUM_AGES; }

static void class_count(Survival *survival, int32_t number, int age, int64_t used, int64_t waited)
{
    for (;; number = survival->classes[number].parent) {
        survival->classes[number].events[age] += used;
        survival->classes[number].at_risk[age] += waited;
        if (number == 0)
            return;
    }
}

/* The class below another one that a feature leads to, 0 if there is none. */
static int32_t child_of(const Survival *survival, int32_t parent, int32_t feature)
{
    int32_t child = survival->classes[parent].first_child;
    while (child && survival->classes[child].feature != feature)
        child = survival->classes[child].sibling;
    return child;
}

/* The same, new if need be; the other one itself when there are too many. */
static int32_t class_below(Survival *survival, int32_t parent, int32_t feature)
{
    Class *classes = survival->classes;
    int32_t child = child_of(survival, parent, feature);
    if (child)
        return child;
    if (survival->num_classes >= MAX_CLASSES)
        return parent;
    int32_t number = survival->num_classes++;
    classes[number].parent = parent;
    classes[number].feature = feature;
    classes[number].depth = classes[parent].depth + 1;
    classes[number].sibling = classes[parent].first_child;
    classes[parent].first_child = number;
    /* Until the next update it is worth what its parent is worth. */
    memcpy(classes[number].hazards, classes[parent].hazards, sizeof classes->hazards);
    memcpy(classes[number].alive, classes[parent].alive, sizeof classes->alive);
    memcpy(worth_of(survival, number), worth_of(survival, parent), NUM_AGES * sizeof(double));
    return number;
}

static int32_t class_of(Survival *survival, const int32_t *features, int num_features)
{
    int32_t number = 0;
    for (int i = 0; i < num_features && i < MAX_DEPTH; i++) {
        int32_t below = class_below(survival, number, features[i]);
        if (below == number)
            break;
        number = below;
    }
    return number;
}

/* The class that features lead to, as far as it was seen. */
static int32_t seen_class_of(const Survival *survival, const int32_t *features, int num_features)
{
    int32_t number = 0;
    for (int i = 0; i < num_features && i < MAX_DEPTH; i++) {
        int32_t below = child_of(survival, number, features[i]);
        if (!below)
            break;
        number = below;
    }
    return number;
}

/* For each age the best ratio of uses to time over all ages at which one may stop to wait. */
static void find_worth(const Survival *survival, const double *hazards, double *worth)
{
    double lasting[NUM_AGES], staying[NUM_AGES];
    for (int age = 0; age < NUM_AGES; age++) {
        lasting[age] = (1.0 - hazards[age] / 2) * survival->widths[age];
        staying[age] = 1.0 - hazards[age];
    }
    for (int age = 0; age < NUM_AGES; age++) {
        double alive = 1.0, uses = 0.0, held = lasting[age] / -2, best_uses = 0.0, best_held = 1.0;
        for (int until = age; until < NUM_AGES; until++) {
            uses += alive * hazards[until];
            held += alive * lasting[until];
            alive *= staying[until];
            if (uses * best_held > best_uses * held) {
                best_uses = uses;
                best_held = held;
            }
        }
        worth[age] = best_uses / best_held;
    }
    if (worth[0] < worth[1]) /* the first age is longer than the next: it would look worse for that alone */
        worth[0] = worth[1];
}

static void class_update(Survival *survival, int32_t number)
{
    Class *this = &survival->classes[number];
    const Class *above = &survival->classes[this->parent];
    double alive = 1.0;
    for (int age = 0; age < NUM_AGES; age++) {
        double weight = number ? PARENT_WEIGHT * above->alive[age] : ROOT_WEIGHT;
        double hazard = number ? above->hazards[age] : ROOT_HAZARD;
        double used = (double)this->events[age] / ONE_OBSERVATION, waited = (double)this->at_risk[age] / ONE_OBSERVATION;
        double found = (used + weight * hazard) / (waited + weight + 1e-9);
        found = found < MOST_HAZARD ? found : MOST_HAZARD;
        this->hazards[age] = found;
        this->alive[age] = alive;
        alive *= 1.0 - found;
    }
    find_worth(survival, this->hazards, worth_of(survival, number));
}

/* Make hazards and worth anew of the next STEP_CLASSES classes; [*first, *end) are theirs. */
static void survival_update(Survival *survival, int32_t *first, int32_t *end)
{
    *first = survival->next_update < survival->num_classes ? survival->next_update : 0;
    *end = *first + STEP_CLASSES < survival->num_classes ? *first + STEP_CLASSES : survival->num_classes;
    for (int32_t number = *first; number < *end; number++)
        class_update(survival, number);
    survival->next_update = *first + STEP_CLASSES;
}

/* 0, or -1 if there is no memory; what is not touched of it costs none. */
static int make_survival(Survival *survival)
{
    survival->classes = calloc(MAX_CLASSES, sizeof(Class));
    survival->worth = calloc((size_t)MAX_CLASSES * NUM_AGES, sizeof(double));
    if (survival->classes == NULL || survival->worth == NULL)
        return -1;
    survival->edges[1] = FIRST_AGE_S;
    for (int age = 1; age < NUM_AGES; age++)
        survival->edges[age + 1] = survival->edges[age] * AGE_STEP;
    for (int age = 0; age < NUM_AGES; age++)
        survival->widths[age] = survival->edges[age + 1] - survival->edges[age];
    survival->num_classes = 1;
    class_update(survival, 0);
    survival->next_update = STEP_CLASSES;
    return 0;
}

static void free_survival(Survival *survival)
{
    free(survival->classes);
    free(survival->worth);
}

#endif
