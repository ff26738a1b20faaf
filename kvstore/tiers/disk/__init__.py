"""The disk tier: pages in a slab file, found through an index in LMDB.

tier                                              the tier
directory, directory_lock, open_directories       one directory, and who has it open
gate                                              what is in use is not closed
slab_file, private_files                          the pages' file
index, index_files, index_snapshots, index_check  the index
meta, page_table, record, slots                   its tables
report                                            a look without configuration
"""
