"""The settings of the commands: which keys there are, what each may hold, and when it has an effect. Plain data only.

kinds.py has the kinds of values, schema.py the keys of each command, walk.py compares a config with them, heard.py says
which keys a choice leaves without effect, and words.py prepares a command line.
"""
