/* The table of radix/_ordered.c: buckets that grow one by one, and entries in the order of insertion.
 *
 *     segments -> [bucket ... bucket]    bucket: chain of entries whose hashes end alike
 *                 [bucket ... bucket]
 *     oldest <-> entry <-> ... <-> newest
 *
 * Linear hashing (W. Litwin, VLDB 1980): `num_buckets` lies in [mask + 1, 2 * mask + 1], and a key is in bucket
 * `hash & (2 * mask + 1)` where there is one yet, else in bucket `hash & mask`. Segments stay where they are.
 *
 * Comparing keys and dropping them may run any code, this table's own functions as well. So an entry is found again
 * when comparing has changed the table, and keys and values are dropped when the table is in order.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define SEGMENT_BITS 7
#define SEGMENT ((Py_ssize_t)1 << SEGMENT_BITS) /* buckets: 1 KiB */
#define FEWEST 8                                /* buckets */

typedef struct Entry {
    struct Entry *chain; /* the next one of the same bucket */
    struct Entry *older, *newer;
    PyObject *key, *value;
    size_t hash; /* mixed */
} Entry;

typedef struct {
    PyObject_HEAD
    Entry ***segments;
    Py_ssize_t num_segments; /* places for them */
    Py_ssize_t num_buckets;
    size_t mask;
    Py_ssize_t num_entries;
    Entry *oldest, *newest;
    size_t version; /* of membership and order */
} Map;

/* ---- buckets ---- */

/* The low bits count. Of an address, which lies on a multiple of 16 and was divided by that, the next three differ too
 * seldom; neighbours stay neighbours, as in a dict: keys of one prompt are made, and used, one after the other. */
static size_t mixed(Py_hash_t hash)
{
    size_t bits = (size_t)hash;
    return bits >> 3 | bits << (8 * sizeof bits - 3);
}

static Entry **bucket(const Map *map, Py_ssize_t number)
{
    return &map->segments[number >> SEGMENT_BITS][number & (SEGMENT - 1)];
}

static Entry **bucket_of(const Map *map, size_t hash)
{
    size_t number = hash & (2 * map->mask + 1);
    if ((Py_ssize_t)number >= map->num_buckets)
        number = hash & map->mask;
    return bucket(map, (Py_ssize_t)number);
}

/* Have memory for bucket `number`, which is the next one. 0, or -1 with MemoryError. */
static int make_bucket(Map *map, Py_ssize_t number)
{
    Py_ssize_t at = number >> SEGMENT_BITS;
    if (at >= map->num_segments) {
        Py_ssize_t wanted = map->num_segments ? 2 * map->num_segments : 4;
        Entry ***grown = PyMem_Realloc(map->segments, (size_t)wanted * sizeof *grown);
        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (Py_ssize_t i = map->num_segments; i < wanted; i++)
            grown[i] = NULL;
        map->segments = grown;
        map->num_segments = wanted;
    }
    if (map->segments[at] == NULL) {
        map->segments[at] = PyMem_Calloc((size_t)SEGMENT, sizeof **map->segments);
        if (map->segments[at] == NULL) {
            PyErr_NoMemory();
            return -1;
        }
    }
    return 0;
}

static int grow(Map *map)
{
    Py_ssize_t number = map->num_buckets;
    if (make_bucket(map, number) < 0)
        return -1;
    Entry **from = bucket(map, number & (Py_ssize_t)map->mask), **to = bucket(map, number);
    *to = NULL;
    while (*from != NULL) {
        Entry *entry = *from;
        if ((Py_ssize_t)(entry->hash & (2 * map->mask + 1)) == number) {
            *from = entry->chain;
            entry->chain = *to;
            *to = entry;
        } else {
            from = &entry->chain;
        }
    }
    if (++map->num_buckets == 2 * (Py_ssize_t)(map->mask + 1))
        map->mask = 2 * map->mask + 1;
    return 0;
}

static void shrink(Map *map)
{
    Py_ssize_t number = --map->num_buckets;
    if (number <= (Py_ssize_t)map->mask)
        map->mask >>= 1;
    Entry **from = bucket(map, number), **to = bucket(map, number & (Py_ssize_t)map->mask);
    while (*to != NULL)
        to = &(*to)->chain;
    *to = *from;
    *from = NULL;
    if ((number & (SEGMENT - 1)) == 0 && number) {
        PyMem_Free(map->segments[number >> SEGMENT_BITS]);
        map->segments[number >> SEGMENT_BITS] = NULL;
    }
}

/* The place that points to the entry of a key; *place is NULL if there is none. NULL with an exception if comparing fails. */
static Entry **find(Map *map, PyObject *key, size_t hash)
{
restart:;
    Entry **place = bucket_of(map, hash);
    for (Entry *entry; (entry = *place) != NULL; place = &entry->chain) {
        if (entry->key == key)
            return place;
        if (entry->hash != hash)
            continue;
        size_t version = map->version;
        PyObject *other = Py_NewRef(entry->key);
        int is_equal = PyObject_RichCompareBool(other, key, Py_EQ);
        Py_DECREF(other);
        if (is_equal < 0)
            return NULL;
        if (version != map->version)
            goto restart; /* comparing has changed the map */
        if (is_equal)
            return place;
    }
    return place;
}

static Entry **find_key(Map *map, PyObject *key, size_t *hash)
{
    Py_hash_t raw = PyObject_Hash(key);
    if (raw == -1)
        return NULL;
    *hash = mixed(raw);
    return find(map, key, *hash);
}

/* ---- order ---- */

static void link_last(Map *map, Entry *entry)
{
    entry->newer = NULL;
    entry->older = map->newest;
    if (map->newest != NULL)
        map->newest->newer = entry;
    else
        map->oldest = entry;
    map->newest = entry;
}

static void link_first(Map *map, Entry *entry)
{
    entry->older = NULL;
    entry->newer = map->oldest;
    if (map->oldest != NULL)
        map->oldest->older = entry;
    else
        map->newest = entry;
    map->oldest = entry;
}

static void unlink_entry(Map *map, Entry *entry)
{
    if (entry->older != NULL)
        entry->older->newer = entry->newer;
    else
        map->oldest = entry->newer;
    if (entry->newer != NULL)
        entry->newer->older = entry->older;
    else
        map->newest = entry->older;
}

/* ---- changes ---- */

static int put(Map *map, PyObject *key, PyObject *value)
{
    size_t hash;
    Entry **place = find_key(map, key, &hash);
    if (place == NULL)
        return -1;
    if (*place != NULL) {
        PyObject *before = (*place)->value;
        (*place)->value = Py_NewRef(value);
        Py_DECREF(before);
        return 0;
    }
    Entry *entry = PyObject_Malloc(sizeof *entry);
    if (entry == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (map->num_entries >= map->num_buckets && grow(map) < 0) {
        PyObject_Free(entry);
        return -1;
    }
    entry->key = Py_NewRef(key);
    entry->value = Py_NewRef(value);
    entry->hash = hash;
    Entry **head = bucket_of(map, hash);
    entry->chain = *head;
    *head = entry;
    link_last(map, entry);
    map->num_entries++;
    map->version++;
    return 0;
}

/* Take the entry at `place` out; its key and value are the caller's. */
static void take(Map *map, Entry **place, PyObject **key, PyObject **value)
{
    Entry *entry = *place;
    *place = entry->chain;
    unlink_entry(map, entry);
    *key = entry->key;
    *value = entry->value;
    PyObject_Free(entry);
    map->num_entries--;
    map->version++;
    for (int i = 0; i < 2 && map->num_buckets > FEWEST && map->num_buckets > 2 * map->num_entries; i++)
        shrink(map);
}

static void clear_map(Map *map)
{
    Entry *entry = map->oldest;
    map->oldest = map->newest = NULL;
    map->num_entries = 0;
    map->version++;
    for (Py_ssize_t number = 0; number < map->num_buckets; number++)
        *bucket(map, number) = NULL;
    for (Py_ssize_t i = 1; i < map->num_segments; i++) {
        PyMem_Free(map->segments[i]);
        map->segments[i] = NULL;
    }
    map->num_buckets = FEWEST;
    map->mask = FEWEST - 1;
    while (entry != NULL) { /* dropping keys may run code that uses the map, which is in order already */
        Entry *next = entry->newer;
        PyObject *key = entry->key, *value = entry->value;
        PyObject_Free(entry);
        Py_DECREF(key);
        Py_DECREF(value);
        entry = next;
    }
}
