// A module of its own, so that the main one never has to know of it.
module upstream

go 1.26.0
