"""The Hugging Face hub: what a repository has, and its files brought here over a network that drops.

snapshot  a repository as a folder in the Hugging Face cache
listing   a repository's files at one commit, those that are needed, and who may have them
fetch     resumable and verified fetching, one file ahead
patience  how long to go on asking a hub that fails"""
