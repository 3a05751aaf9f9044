"""The command `routes`: which experts each token of a text used, as numbers and as a picture.

    commands    runs a prompt and its answer, writes the picture
    report      what was found, and how evenly and how steadily experts were chosen
    view        what both pictures show: colours, labels, and the tokens that have room
    picture     the PNG
    page        the HTML

How choices are noted is `routing`'s business."""
