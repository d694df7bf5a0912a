€cposix
system
(S'true'
tR.