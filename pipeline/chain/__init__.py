"""`dit-cache run`: from a data set to its cache by one command, each step in a process of its own.

`steps` does one step; `state` says which are done, `records` what that is held against; `chain` goes through them and
`process` starts each; `forecast` says beforehand what is to come, `text` in words.
"""
