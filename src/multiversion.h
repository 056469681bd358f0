/* How a kernel is compiled for several instruction sets, of which the loader picks one. */
#ifndef GALA_MPI_MULTIVERSION_H
#define GALA_MPI_MULTIVERSION_H

#ifdef HAS_TARGET_CLONES
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION
#endif

/* A function that each instruction set's kernel compiles anew, as part of itself. */
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#endif
