"""The parts of an engine for many prompts at once; what runs them together is still to come.

batch      several sequences through the model in one pass
drafts     guesses at what a text goes on with, from what it said before, and how many of them pay
grammar    a JSON schema, regex, Lark grammar or choice of texts, compiled, and which tokens may come next; with
           vocabulary, schemas and proof
tools      which tools may be called, the grammar that holds calls to it, and calls given out while they are written
prefixes   keys and values of prompts that were read, kept in memory for prompts that begin alike
blocks     the same on disk, over restarts
frozen     mlx-lm's caches as plain arrays, and back"""
