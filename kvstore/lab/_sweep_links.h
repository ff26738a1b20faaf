/* Lists of blocks that share one array of links: a block is in one of them, or in none.
 *
 * A list is a ring through a node of its own behind those of the blocks. A block that is in no list points to itself.
 */
#ifndef KVTIERS_SWEEP_LINKS_H
#define KVTIERS_SWEEP_LINKS_H

#include "_sweep_memory.h"

typedef struct {
    int32_t next, prev;
} Link;

/* num_lists: their nodes are num_blocks, num_blocks + 1, and so on. */
static Link *new_links(Memory *memory, int32_t num_blocks, int num_lists)
{
    Link *links = new_array(memory, (size_t)num_blocks + num_lists, sizeof *links);
    if (links != NULL)
        for (int32_t node = 0; node < num_blocks + num_lists; node++)
            links[node].next = links[node].prev = node;
    return links;
}

static inline void unlink_block(Link *links, int32_t block)
{
    Link link = links[block];
    links[link.prev].next = link.next;
    links[link.next].prev = link.prev;
    links[block].next = links[block].prev = block;
}

/* Put a block that is in no list at the newest end. */
static inline void append_block(Link *links, int32_t list, int32_t block)
{
    int32_t last = links[list].prev;
    links[last].next = block;
    links[block].prev = last;
    links[block].next = list;
    links[list].prev = block;
}

static inline int is_empty(const Link *links, int32_t list) { return links[list].next == list; }

/* The first `n` of a list, oldest first; returns how many there are. */
static int64_t first_of(const Link *links, int32_t list, int64_t n, int32_t *out)
{
    int64_t found = 0;
    for (int32_t block = links[list].next; block != list && found < n; block = links[block].next)
        out[found++] = block;
    return found;
}

#endif
