"""SGLang's HiCache with our store below it."""
