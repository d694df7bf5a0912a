(dp0
.