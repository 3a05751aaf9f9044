"""How fast a model runs here, next to another engine and to what this machine can do at all.

    commands   the command `bench`: a request → text and objects
    rows       which figures there are, and how a row is shortened
    sides      the engines that can be measured, as command lines
    turns      the sides run in turns, A B A B, each in a process of its own
    process    a side's process, seen from here
    worker     a side's process, seen from inside; its docstring is the protocol for other engines
    limits     what this machine's memory and processor reach
    floor      the bytes and operations that a row cannot do without
    report     samples → medians, spread, ratio and share of the floor; saved and read again
    table      a report as text and as Markdown
    page       the same as HTML
    roofline   the page's picture: where each row stands under the machine's limits
    compare    two saved reports side by side

A model is run in worker processes only, so nothing this process does gets in their way."""
