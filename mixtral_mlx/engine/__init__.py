"""Many requests at once: each submitted from any thread, all answered by one that owns the model.

engine     what programs embed: load a model, ask it, close it
request    what can be asked, and what comes back; reply: how it is read
worker     the thread: who runs, what goes into a pass; parking: where threads wait for the next model
answering  one request while it is answered
batch      several sequences through the model in one pass
routing    which experts the passes choose, counted while somebody looks
drafts     guesses at what a text goes on with, from what it said before, and how many of them pay
drafting   a small model that guesses it instead
grammar    a JSON schema, regex, Lark grammar or choice of texts, compiled, and which tokens may come next; with
           vocabulary, schemas and proof
tools      which tools may be called, the grammar that holds calls to it, and calls given out while they are written
adapters   LoRA, put into a running model and taken out again
prefixes   keys and values of prompts that were read, kept in memory for prompts that begin alike
blocks     the same on disk, over restarts
frozen     mlx-lm's caches as plain arrays, and back"""
